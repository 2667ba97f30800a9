// The fused elementwise ops: norms, gated activations, rope with QK-norm and cache write. Arithmetic in float32;
// values are rounded to the model's dtype exactly where the torch reference rounds them.
#pragma once
#include <cmath>
#include "abi.h"
#include "vec.h"

namespace {

template <class T> DG_INLINE vf rounded(vf x) {
  T t[W];
  store(t, x);
  return load(t);
}
template <> DG_INLINE vf rounded<float>(vf x) { return x; }

template <class T> DG_INLINE vf load_at(const T* p, int64_t i, int64_t n) {
  return i + W <= n ? load(p + i) : load_n(p + i, (int)(n - i));
}
template <class T> DG_INLINE void store_at(T* p, int64_t i, int64_t n, vf x) {
  if (i + W <= n) store(p + i, x);
  else store_n(p + i, x, (int)(n - i));
}

// Functions are kept out of line on purpose: inlined into every pair of dtypes they take a minute to compile.

// ---- RMS norm -----------------------------------------------------------------------------------------

// y = x / rms(x), times (1 + w) in float32 (offset) or rounded first and then times w.
template <class T, class Wt>
inline __attribute__((noinline)) void norm_row(const T* x, const Wt* w, T* y, int64_t n, float eps, float offset, bool round_first) {
  vf s0{}, s1{};
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    vf a = load(x + i), b = load(x + i + W);
    s0 = fma(a, a, s0);
    s1 = fma(b, b, s1);
  }
  for (; i < n; i += W) {
    vf a = load_at(x, i, n);
    s0 = fma(a, a, s0);
  }
  const float r = 1.f / std::sqrt(reduce_add(s0 + s1) / (float)n + eps);
  for (i = 0; i < n; i += W) {
    vf v = load_at(x, i, n) * set1(r);
    vf g = load_at(w, i, n);
    v = round_first ? rounded<T>(v) * g : v * (g + set1(offset));
    store_at(y, i, n, v);
  }
}

template <class T, class Wt> void norm_rows(const DgNorm& a) {
  for (int64_t row = 0; row < a.rows; row++) {
    const T* x = (const T*)a.x + row * a.x_st;
    if (a.residual_in) {
      const T* in = (const T*)a.residual_in + row * a.r_st;
      T* total = (T*)a.residual_out + row * a.ro_st;
      for (int64_t i = 0; i < a.n; i += W) store_at(total, i, a.n, load_at(x, i, a.n) + load_at(in, i, a.n));
      x = total;
    }
    norm_row<T, Wt>(x, (const Wt*)a.w, (T*)a.y + row * a.y_st, a.n, a.eps, a.offset, a.offset == 0.f);
  }
}

template <class T> void norm_w(const DgNorm& a) {
  switch (a.w_dtype) {
    case DG_F32: return norm_rows<T, float>(a);
    case DG_BF16: return norm_rows<T, bf16>(a);
    case DG_F16: return norm_rows<T, f16>(a);
  }
}
void norm(const DgNorm* a) {
  switch (a->dtype) {
    case DG_F32: return norm_w<float>(*a);
    case DG_BF16: return norm_w<bf16>(*a);
    case DG_F16: return norm_w<f16>(*a);
  }
}

// ---- gated activations --------------------------------------------------------------------------------

template <class T> void gated_rows(const T* x, int64_t x_st, T* y, int64_t y_st, int64_t rows, int64_t n, int kind) {
  for (int64_t row = 0; row < rows; row++, x += x_st, y += y_st)
    for (int64_t i = 0; i < n; i += W) {
      vf g = load_at(x, i, n), up = load_at(x + n, i, n), a;
      if (kind == 0) {
        a = g / (set1(1.f) + vexp(vf{} - g));
      } else {
        vf inner = set1(0.79788456080286536f) * fma(set1(0.044715f) * g * g, g, g);
        a = set1(0.5f) * g * (set1(1.f) + vtanh(inner));
      }
      store_at(y, i, n, rounded<T>(a) * up);
    }
}
void gated(const void* x, int64_t x_st, void* y, int64_t y_st, int32_t rows, int32_t n, int32_t dtype, int32_t kind) {
  switch (dtype) {
    case DG_F32: return gated_rows((const float*)x, x_st, (float*)y, y_st, rows, n, kind);
    case DG_BF16: return gated_rows((const bf16*)x, x_st, (bf16*)y, y_st, rows, n, kind);
    case DG_F16: return gated_rows((const f16*)x, x_st, (f16*)y, y_st, rows, n, kind);
  }
}

// ---- arg max -------------------------------------------------------------------------------------------

// The lowest index of the largest value; NaN counts as the largest. Two passes over a row that the first leaves in the
// cache are faster than one that carries indices along.
template <class T> inline __attribute__((noinline)) int64_t argmax_row(const T* x, int64_t n) {
  constexpr int U = 4;
  vf best[U];
  vi nan = vi{};
  for (int u = 0; u < U; u++) best[u] = set1(-INFINITY);
  int64_t i = 0;
  for (; i + U * W <= n; i += U * W)
    for (int u = 0; u < U; u++) {
      vf v = load(x + i + u * W);
      nan |= v != v;
      best[u] = v > best[u] ? v : best[u];
    }
  float top = -INFINITY;
  bool broken = false;
  for (int lane = 0; lane < W; lane++) {
    broken |= nan[lane] != 0;
    for (int u = 0; u < U; u++) top = best[u][lane] > top ? best[u][lane] : top;
  }
  for (; i < n; i++) {
    const float v = scalar(x[i]);
    broken |= v != v;
    top = v > top ? v : top;
  }
  for (i = 0; i + W <= n; i += W) {
    vf v = load(x + i);
    vi hit = broken ? (vi)(v != v) : (vi)(v == set1(top));
    int any = 0;
    for (int lane = 0; lane < W; lane++) any |= hit[lane];
    if (any)
      for (int lane = 0; lane < W; lane++)
        if (hit[lane]) return i + lane;
  }
  for (; i < n; i++) {
    const float v = scalar(x[i]);
    if (broken ? v != v : v == top) return i;
  }
  return 0;
}
template <class T> void argmax_rows(const T* x, int64_t x_st, int64_t* y, int64_t rows, int64_t n) {
  for (int64_t row = 0; row < rows; row++) y[row] = argmax_row(x + row * x_st, n);
}
void argmax(const void* x, int64_t x_st, int64_t* y, int32_t rows, int64_t n, int32_t dtype) {
  switch (dtype) {
    case DG_F32: return argmax_rows((const float*)x, x_st, y, rows, n);
    case DG_BF16: return argmax_rows((const bf16*)x, x_st, y, rows, n);
    case DG_F16: return argmax_rows((const f16*)x, x_st, y, rows, n);
  }
}

// ---- cache write --------------------------------------------------------------------------------------

// Element strides of 1 take whole vectors; a scale divides, as the reference does.
template <class T, class C>
inline __attribute__((noinline)) void write_row(const T* from, C* to, int64_t to_sd, int dim, const float* scale) {
  for (int d = 0; d < dim; d += W) {
    vf x = load_at(from, d, dim);
    if (scale) x = x / set1(*scale);
    if (to_sd == 1) store_at(to, d, dim, x);
    else
      for (int i = 0; i < W && d + i < dim; i++) put(to + (d + i) * to_sd, x[i]);
  }
}

template <class T, class C> inline __attribute__((noinline)) void write_token(const DgWrite& a, int64_t t, const T* k, const T* v) {
  const int64_t slot = a.slots[t], block = slot / a.block, place = slot % a.block;
  C* kc = (C*)a.k_cache + block * a.kc_sb + place * a.kc_sn;
  C* vc = (C*)a.v_cache + block * a.vc_sb + place * a.vc_sn;
  for (int h = 0; h < a.kv_heads; h++) {
    write_row(k + h * a.k_sh, kc + h * a.kc_sh, a.kc_sd, a.dim, a.k_scale ? a.k_scale + h * a.k_scale_stride : nullptr);
    if (a.dim_v) write_row(v + h * a.v_sh, vc + h * a.vc_sh, a.vc_sd, a.dim_v, a.v_scale ? a.v_scale + h * a.v_scale_stride : nullptr);
  }
}

template <class T, class C> void write_tokens(const DgWrite& a) {
  for (int64_t t = 0; t < a.tokens; t++)
    write_token<T, C>(a, t, (const T*)a.k + t * a.k_st, (const T*)a.v + t * a.v_st);
}
template <class T> void write_as(const DgWrite& a) {
  switch (a.cache_dtype) {
    case DG_F32: return write_tokens<T, float>(a);
    case DG_BF16: return write_tokens<T, bf16>(a);
    case DG_F16: return write_tokens<T, f16>(a);
    case DG_I8: return write_tokens<T, int8_t>(a);
    case DG_E4M3: return write_tokens<T, e4m3>(a);
  }
}
void write_cache(const DgWrite* a) {
  switch (a->dtype) {
    case DG_F32: return write_as<float>(*a);
    case DG_BF16: return write_as<bf16>(*a);
    case DG_F16: return write_as<f16>(*a);
  }
}

// ---- rope ---------------------------------------------------------------------------------------------

// Rotate one head: pairs (i, i + half), or (2i, 2i + 1) when interleaved. In place is allowed.
template <class T>
inline __attribute__((noinline)) void rotate(const T* x, T* y, int dim, int rot, bool interleaved, const float* cos, const float* sin) {
  const int half = rot / 2;
  if (!interleaved) {
    for (int i = 0; i < half; i += W) {
      vf c = load_at(cos, i, half), s = load_at(sin, i, half);
      vf a = load_at(x, i, half), b = load_at(x + half, i, half);
      store_at(y, i, half, a * c - b * s);
      store_at(y + half, i, half, b * c + a * s);
    }
  } else {
    for (int i = 0; i < half; i++) {
      const float a = scalar(x[2 * i]), b = scalar(x[2 * i + 1]);
      put(y + 2 * i, a * cos[i] - b * sin[i]);
      put(y + 2 * i + 1, b * cos[i] + a * sin[i]);
    }
  }
  if (x != y) memcpy(y + rot, x + rot, sizeof(T) * (dim - rot));
}

template <class T>
inline __attribute__((noinline)) void head(const DgRope& a, const T* x, T* y, const void* weight, const float* cos, const float* sin) {
  const int dim = a.write.dim;
  if (weight) {
    const float offset = a.norm_offset;
    if (a.norm_dtype == DG_F32) norm_row(x, (const float*)weight, y, dim, a.eps, offset, offset == 0);
    else norm_row(x, (const T*)weight, y, dim, a.eps, offset, offset == 0);
    x = y;
  }
  if (cos) rotate(x, y, dim, a.rotary_dim, a.interleaved, cos, sin);
  else if (x != y) memcpy(y, x, sizeof(T) * dim);
}

template <class T, class C> void rope_tokens(const DgRope& a) {
  const int dim = a.write.dim;
  T* k_row = (T*)dg_scratch(3, sizeof(T) * dim * a.write.kv_heads);
  DgWrite w = a.write;
  w.k_sh = dim;
  for (int64_t t = 0; t < w.tokens; t++) {
    const float* cos = a.cos ? a.cos + a.positions[t] * a.table_stride : nullptr;
    const float* sin = a.cos ? a.sin + a.positions[t] * a.table_stride : nullptr;
    for (int h = 0; h < a.heads; h++)
      head(a, (const T*)a.q + t * a.q_st + h * a.q_sh, (T*)a.q_out + t * a.qo_st + h * a.qo_sh, a.q_norm, cos, sin);
    if (!a.write_cache) continue;
    for (int h = 0; h < w.kv_heads; h++)
      head(a, (const T*)w.k + t * w.k_st + h * a.write.k_sh, k_row + h * dim, a.k_norm, cos, sin);
    write_token<T, C>(w, t, k_row, (const T*)w.v + t * w.v_st);
  }
}
template <class T> void rope_as(const DgRope& a) {
  switch (a.write_cache ? a.write.cache_dtype : a.write.dtype) {
    case DG_F32: return rope_tokens<T, float>(a);
    case DG_BF16: return rope_tokens<T, bf16>(a);
    case DG_F16: return rope_tokens<T, f16>(a);
    case DG_I8: return rope_tokens<T, int8_t>(a);
    case DG_E4M3: return rope_tokens<T, e4m3>(a);
  }
}
void rope(const DgRope* a) {
  switch (a->write.dtype) {
    case DG_F32: return rope_as<float>(*a);
    case DG_BF16: return rope_as<bf16>(*a);
    case DG_F16: return rope_as<f16>(*a);
  }
}

}  // namespace
