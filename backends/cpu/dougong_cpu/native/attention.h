// Paged and ragged attention: every row, head group and span of keys is one item of work on a tile of queries.
//
// A tile holds up to kRows (query position, head) pairs of one kv head. Keys come in chunks of kKeys: the chunk's K
// is converted to float32 and transposed into kt[D][kKeys], its V into vt[kKeys][Dv]; only visible keys are ever
// read, so nothing unwritten can reach the arithmetic. Then S = Q kt, an online softmax per row, O += P vt.
// A row with one tile and many keys is split into fixed spans merged by LSE. The rule depends on the row alone:
// neither the number of threads nor the rest of the batch changes a bit of its result.
#pragma once
#include <cmath>
#include "abi.h"
#include "gemm.h"
#include "thin.h"

namespace {

constexpr int kRows = 64;    // rows of a tile
constexpr int kKeys = 64;    // keys of a chunk
constexpr int kSpan = 2048;  // keys of a split
constexpr int kTile = kManyRegisters ? 6 : 4;                       // rows of a register tile
constexpr int kVecs = W == 16 ? 4 : kManyRegisters ? 4 : 2;         // vectors of a register tile

struct Item { int32_t row, first_query, queries, kv_head, first_head, heads; int64_t key0, key1; int32_t part; };

struct Tile {  // the state of one item
  int rows, dv_pad;
  bool thin;
  float *q, *kt, *vt, *s, *o;  // q [ceil(rows/kTile)][D][kTile] (thin: [rows][D]), kt [D][kKeys], vt [kKeys][dv_pad], s [rows][kKeys]
  float m[kRows], l[kRows];
};

struct Convert {  // the steps that know a dtype; everything between them is float32
  void (*pack_q)(const DgAttention&, const Item&, Tile&, int64_t token0);
  void (*pack_k)(const DgAttention&, Tile&, const void* const* key, int n);
  void (*pack_v)(const DgAttention&, Tile&, const void* const* key, int n);
  void (*put_row)(const DgAttention&, int64_t token, int head, const float* o, float factor, bool empty);
  ThinScores (*thin_scores)(int rows);  // null: this dtype has no thin path
  ThinValues (*thin_values)(int rows);
  int64_t kv_size;
};

DG_INLINE int64_t imin(int64_t a, int64_t b) { return a < b ? a : b; }
DG_INLINE int64_t imax(int64_t a, int64_t b) { return a > b ? a : b; }

// Keys [lo, hi) that the query at `pos` sees among the row's `len`.
DG_INLINE void visible(const DgAttention& A, int64_t pos, int64_t len, int64_t* lo, int64_t* hi) {
  *lo = A.window ? imax(0, pos - A.window + 1) : 0;
  *hi = A.causal ? imin(len, pos + 1) : A.window ? imin(len, pos + A.window) : len;
  if (*hi < *lo) *hi = *lo;
}

template <class T> void pack_q(const DgAttention& A, const Item& it, Tile& t, int64_t token0) {
  const T* base = (const T*)A.q;
  for (int r = 0; r < t.rows; r++) {
    const T* p = base + (token0 + r / it.heads) * A.q_st + (it.first_head + r % it.heads) * A.q_sh;
    float* d = t.thin ? t.q + (int64_t)r * A.dim : t.q + (int64_t)(r / kTile) * kTile * A.dim + r % kTile;
    const int step = t.thin ? 1 : kTile;
    for (int i = 0; i < A.dim; i++) d[i * step] = scalar(p[i * A.q_sd]);
  }
}

// One vector of W lanes from d on, zero past the end.
template <class T> DG_INLINE vf row_vec(const T* p, int64_t stride, int d, int dim) {
  if (stride == 1) return d + W <= dim ? load(p + d) : load_n(p + d, dim - d);
  float t[W];
  for (int i = 0; i < W; i++) t[i] = d + i < dim ? scalar(p[(d + i) * stride]) : 0.f;
  return load(t);
}

template <class T> void pack_k(const DgAttention& A, Tile& t, const void* const* key, int n) {
  for (int k0 = 0; k0 < n; k0 += W)
    for (int d = 0; d < A.dim; d += W) {
      vf r[W];
      for (int i = 0; i < W; i++) r[i] = k0 + i < n ? row_vec((const T*)key[k0 + i], A.k_sd, d, A.dim) : vf{};
      transpose(r);
      int nd = A.dim - d < W ? A.dim - d : W;
      for (int i = 0; i < nd; i++) store(t.kt + (int64_t)(d + i) * kKeys + k0, r[i]);
    }
}

template <class T> void pack_v(const DgAttention& A, Tile& t, const void* const* key, int n) {
  for (int k = 0; k < n; k++)
    for (int d = 0; d < t.dv_pad; d += W)
      store(t.vt + (int64_t)k * t.dv_pad + d, row_vec((const T*)key[k], A.v_sd, d, A.dim_v));
}

template <int R, int NV> DG_INLINE void scores(const Tile& t, const float* q, float* s, int v0, int dim) {
  tile<R, NV, 1, kTile>(q, t.kt + v0 * W, kKeys, dim,
                        [&](int r, int v, vf x) { store(s + r * kKeys + (v0 + v) * W, x); });
}
template <int R, int NV> DG_INLINE void values(const Tile& t, const float* p, float* o, int v0, int n) {
  tile<R, NV, kKeys, 1>(p, t.vt + v0 * W, t.dv_pad, n, [&](int r, int v, vf x) {
    float* d = o + (int64_t)r * t.dv_pad + (v0 + v) * W;
    store(d, load(d) + x);
  });
}

// f.template run<R, NV>(v0) over `vecs` vectors with `rows` <= kTile rows.
template <int R, class F> inline void over_vectors(int vecs, F f) {
  int v = 0;
  for (; v + kVecs <= vecs; v += kVecs) f.template run<R, kVecs>(v);
  for (; v + 2 <= vecs; v += 2) f.template run<R, 2>(v);
  for (; v < vecs; v++) f.template run<R, 1>(v);
}
template <class F> inline void over_tile(int rows, int vecs, F f) {
  switch (rows) {
    case 1: over_vectors<1>(vecs, f); break;
    case 2: over_vectors<2>(vecs, f); break;
    case 3: over_vectors<3>(vecs, f); break;
    case 4: over_vectors<4>(vecs, f); break;
    case 5: over_vectors<5>(vecs, f); break;
    case 6: over_vectors<6>(vecs, f); break;
  }
}
struct ScoresRun {
  const Tile& t; const float* q; float* s; int dim;
  template <int R, int NV> DG_INLINE void run(int v) { scores<R, NV>(t, q, s, v, dim); }
};
struct ValuesRun {
  const Tile& t; const float* p; float* o; int n;
  template <int R, int NV> DG_INLINE void run(int v) { values<R, NV>(t, p, o, v, n); }
};

// Softmax step of one row over a chunk: scores in s, of which [a, b) are visible, become weights; returns the factor
// by which what was summed before must shrink.
inline __attribute__((noinline)) float soften(const DgAttention& A, float* s, int a, int b, float scale, float slope, float distance, float* m,
                       float* l) {
  const vf inf = set1(-INFINITY);
  int v0 = a / W, v1 = (b + W - 1) / W;
  vf top = inf;
  for (int v = v0; v < v1; v++) {
    vf x = load(s + v * W) * set1(scale);
    if (A.softcap != 0.f) x = set1(A.softcap) * vtanh(x / set1(A.softcap));
    vi at = iota() + v * W;
    if (A.slopes) x = fma(set1(slope), to_float(at) + set1(distance), x);
    if (v * W < a || (v + 1) * W > b) x = (at >= a) & (at < b) ? x : inf;
    store(s + v * W, x);
    top = vmax(top, x);
  }
  float before = *m, now = reduce_max(top);
  now = now > before ? now : before;
  float centre = now == -INFINITY ? 0.f : now;
  vf sum{};
  for (int v = v0; v < v1; v++) {
    vf p = vexp(load(s + v * W) - set1(centre));
    store(s + v * W, p);
    sum += p;
  }
  float shrink = before == now ? 1.f : before == -INFINITY ? 0.f : vexp(set1(before - centre))[0];
  *m = now;
  *l = *l * shrink + reduce_add(sum);
  for (int v = 0; v < v0; v++) store(s + v * W, vf{});
  for (int v = v1; v < kKeys / W; v++) store(s + v * W, vf{});
  return shrink;
}

inline void run_item(const DgAttention& A, const Convert& C, const Item& it, Tile& t) {
  const int64_t token0 = A.cu_q[it.row] + it.first_query;
  const int64_t q_len = A.cu_q[it.row + 1] - A.cu_q[it.row];
  const int64_t len = A.kv_len ? A.kv_len[it.row] : A.cu_k[it.row + 1] - A.cu_k[it.row];
  const int64_t pos0 = len - q_len + it.first_query;
  const int32_t* table = A.kv_len ? A.block_table + it.row * A.bt_sb : nullptr;
  const float k_scale = A.k_scale ? A.k_scale[it.kv_head * A.k_scale_stride] : 1.f;
  const float scale = A.scale * k_scale;
  C.pack_q(A, it, t, token0);
  for (int r = 0; r < t.rows; r++) t.m[r] = -INFINITY, t.l[r] = 0.f;
  memset(t.o, 0, sizeof(float) * t.rows * t.dv_pad);

  int64_t lo, hi, skip;
  visible(A, pos0, len, &lo, &skip);                     // visible ranges only move right along the tile
  visible(A, pos0 + it.queries - 1, len, &skip, &hi);
  lo = imax(lo, it.key0);
  hi = imin(hi, it.key1);
  const int64_t size = C.kv_size;
  const char* kbase = (const char*)A.k + it.kv_head * A.k_sh * size;
  const char* vbase = (const char*)A.v + it.kv_head * A.v_sh * size;

  for (int64_t base = lo; base < hi; base += kKeys) {
    const int n = (int)imin(kKeys, hi - base);
    const void *kp[kKeys], *vp[kKeys];
    if (table) {
      int64_t entry = base / A.block, slot = base % A.block;
      for (int i = 0; i < n;) {
        const char* kb = kbase + (int64_t)table[entry] * A.k_sb * size;
        const char* vb = vbase + (int64_t)table[entry] * A.v_sb * size;
        for (; i < n && slot < A.block; i++, slot++)
          kp[i] = kb + slot * A.k_sn * size, vp[i] = vb + slot * A.v_sn * size;
        entry++;
        slot = 0;
      }
    } else {
      const int64_t first = A.cu_k[it.row] + base;
      for (int i = 0; i < n; i++)
        kp[i] = kbase + (first + i) * A.k_sn * size, vp[i] = vbase + (first + i) * A.v_sn * size;
    }
    if (!t.thin) {
      C.pack_k(A, t, kp, n);
      C.pack_v(A, t, vp, n);
    }
    const int vecs = (n + W - 1) / W, step = t.thin ? kThinTile : kTile;
    for (int r = 0; r < t.rows; r += step) {
      const int rows = t.rows - r < step ? t.rows - r : step;
      float* s = t.s + (int64_t)r * kKeys;
      float* o = t.o + (int64_t)r * t.dv_pad;
      if (t.thin) C.thin_scores(rows)(t.q + (int64_t)r * A.dim, kp, n, A.dim, s, kKeys);
      else over_tile(rows, vecs, ScoresRun{t, t.q + (int64_t)r * A.dim, s, A.dim});
      bool any = false;
      for (int i = 0; i < rows; i++) {
        const int64_t pos = pos0 + (r + i) / it.heads;
        int64_t a, b;
        visible(A, pos, len, &a, &b);
        a = imax(a - base, 0);
        b = imin(b - base, n);
        if (a >= b) {
          memset(s + i * kKeys, 0, sizeof(float) * kKeys);
          continue;
        }
        any = true;
        const float slope = A.slopes ? A.slopes[it.first_head + (r + i) % it.heads] : 0.f;
        const float f = soften(A, s + i * kKeys, (int)a, (int)b, scale, slope, (float)(base - pos), t.m + r + i,
                               t.l + r + i);
        if (f != 1.f)
          for (int d = 0; d < t.dv_pad; d += W) {
            float* at = o + (int64_t)i * t.dv_pad + d;
            store(at, load(at) * set1(f));
          }
      }
      if (any && t.thin) C.thin_values(rows)(s, kKeys, vp, n, t.dv_pad, o);
      else if (any) over_tile(rows, t.dv_pad / W, ValuesRun{t, s, o, n});
    }
  }
}

// Write a finished row: divide by the denominator (a sink joins it once), scale V back, convert.
template <class Q> void put_row(const DgAttention& A, int64_t token, int head, const float* o, float factor, bool empty) {
  Q* out = (Q*)A.out + token * A.o_st + head * A.o_sh;
  for (int d = 0; d < A.dim_v; d += W) {
    vf x = empty ? vf{} : load(o + d) * set1(factor);
    const int n = A.dim_v - d < W ? A.dim_v - d : W;
    if (A.o_sd == 1) {
      if (n == W) store(out + d, x);
      else store_n(out + d, x, n);
    } else {
      for (int i = 0; i < n; i++) put(out + (d + i) * A.o_sd, x[i]);
    }
  }
}

inline void finish(const DgAttention& A, const Convert& C, int64_t token, int head, int kv_head, const float* o, float m,
                   float l) {
  const bool empty = !(l > 0.f || l != l);
  double factor = 0;
  if (!empty) {
    factor = 1.0 / l;
    if (A.sinks) {  // shift by the larger of the two so that neither exponential overflows
      const double sink = (double)A.sinks[head] - m;
      factor = sink > 0 ? std::exp(-sink) / (l * std::exp(-sink) + 1.0) : 1.0 / (l + std::exp(sink));
    }
    if (A.v_scale) factor *= A.v_scale[kv_head * A.v_scale_stride];
  }
  C.put_row(A, token, head, o, (float)factor, empty);
  if (A.lse) A.lse[token * A.lse_st + head * A.lse_sh] = empty ? -INFINITY : m + (float)std::log((double)l);
}

struct Job { const DgAttention* a; const Convert* convert; const Item* items; float* parts; int64_t part_size; };

inline void work(void* ctx, int64_t index) {
  const Job& job = *(const Job*)ctx;
  const DgAttention& A = *job.a;
  const Item& it = job.items[index];
  Tile t;
  t.rows = it.queries * it.heads;
  t.dv_pad = (A.dim_v + W - 1) / W * W;
  t.thin = t.rows <= kThin && job.convert->thin_scores && A.dim % W == 0 && A.dim_v % W == 0 && A.k_sd == 1 && A.v_sd == 1;
  const int64_t padded = (int64_t)(t.rows + kTile - 1) / kTile * kTile;
  const int64_t sizes[4] = {padded * A.dim, (int64_t)A.dim * kKeys, (int64_t)kKeys * t.dv_pad, padded * kKeys};
  float* at = (float*)dg_scratch(0, sizeof(float) * (sizes[0] + sizes[1] + sizes[2] + sizes[3] + padded * t.dv_pad + 5 * 16));
  float** fields[4] = {&t.q, &t.kt, &t.vt, &t.s};
  for (int i = 0; i < 4; i++) *fields[i] = at, at += (sizes[i] + 15) / 16 * 16;
  t.o = at;
  const Convert& C = *job.convert;
  run_item(A, C, it, t);
  if (it.part < 0) {
    for (int r = 0; r < t.rows; r++)
      finish(A, C, A.cu_q[it.row] + it.first_query + r / it.heads, it.first_head + r % it.heads, it.kv_head,
                t.o + (int64_t)r * t.dv_pad, t.m[r], t.l[r]);
  } else {
    float* p = job.parts + it.part * job.part_size;
    memcpy(p, t.m, sizeof(float) * t.rows);
    memcpy(p + kRows, t.l, sizeof(float) * t.rows);
    memcpy(p + 2 * kRows, t.o, sizeof(float) * t.rows * t.dv_pad);
  }
}

// Merge `count` parts of one tile by their LSE and write the rows.
inline void merge(const Job& job, const Item& it, int count) {
  const DgAttention& A = *job.a;
  const int dv_pad = (A.dim_v + W - 1) / W * W, rows = it.queries * it.heads;
  float* first = job.parts + it.part * job.part_size;
  for (int r = 0; r < rows; r++) {
    float m = -INFINITY, l = 0.f;
    for (int p = 0; p < count; p++) m = std::fmax(m, first[p * job.part_size + r]);
    float* o = first + 2 * kRows + (int64_t)r * dv_pad;
    for (int p = 0; p < count; p++) {
      const float* part = first + p * job.part_size;
      const float f = part[r] == -INFINITY ? 0.f : vexp(set1(part[r] - m))[0];
      l += f * part[kRows + r];
      const float* from = part + 2 * kRows + (int64_t)r * dv_pad;
      for (int d = 0; d < dv_pad; d += W)
        store(o + d, p ? fma(set1(f), load(from + d), load(o + d)) : set1(f) * load(from + d));
    }
    finish(A, *job.convert, A.cu_q[it.row] + it.first_query + r / it.heads, it.first_head + r % it.heads, it.kv_head, o, m, l);
  }
}

inline void attend(const DgAttention& A, const Convert& C) {
  const int group = A.heads / A.kv_heads;
  const int heads = group < kRows ? group : kRows, head_tiles = (group + heads - 1) / heads;
  const int queries = kRows / heads;
  const int64_t span = A.span > 0 ? A.span : kSpan;
  int64_t count = 0, parts = 0;
  for (int pass = 0; pass < 2; pass++) {
    Item* items = pass ? (Item*)dg_scratch(1, sizeof(Item) * (count + 1)) : nullptr;
    count = parts = 0;
    for (int b = 0; b < A.rows; b++) {
      const int64_t q_len = A.cu_q[b + 1] - A.cu_q[b];
      const int64_t len = A.kv_len ? A.kv_len[b] : A.cu_k[b + 1] - A.cu_k[b];
      for (int64_t q0 = 0; q0 < q_len; q0 += queries) {
        const int nq = (int)imin(queries, q_len - q0);
        int64_t lo, hi, skip;
        visible(A, len - q_len + q0, len, &lo, &skip);
        visible(A, len - q_len + q0 + nq - 1, len, &skip, &hi);
        const int64_t splits = q_len <= queries && hi - lo > span ? (hi - lo + span - 1) / span : 1;
        for (int k = 0; k < A.kv_heads; k++)
          for (int h = 0; h < head_tiles; h++)
            for (int64_t p = 0; p < splits; p++) {
              if (pass) {
                const int h0 = k * group + h * heads;
                Item& it = items[count];
                it = Item{b, (int32_t)q0, nq, k, h0, (int32_t)imin(heads, (k + 1) * group - h0), 0, INT64_MAX, -1};
                if (splits > 1) it.key0 = lo + p * span, it.key1 = lo + (p + 1) * span, it.part = (int32_t)parts;
              }
              count++;
              if (splits > 1) parts++;
            }
      }
    }
    if (!pass) continue;
    const int dv_pad = (A.dim_v + W - 1) / W * W;
    Job job{&A, &C, items, nullptr, 2 * kRows + (int64_t)kRows * dv_pad};
    if (parts) job.parts = (float*)dg_scratch(2, sizeof(float) * parts * job.part_size);
    dg_parallel(count, A.threads, work, &job);
    for (int64_t i = 0; i < count;) {
      if (items[i].part < 0) { i++; continue; }
      int64_t n = 1;
      while (i + n < count && items[i + n].part >= 0 && items[i + n].key0 > items[i].key0 &&
             items[i + n].row == items[i].row && items[i + n].first_head == items[i].first_head) n++;
      merge(job, items[i], (int)n);
      i += n;
    }
  }
}

template <class T> void set_q(Convert& c) { c.pack_q = pack_q<T>, c.put_row = put_row<T>; }
template <class T> void set_kv(Convert& c) { c.pack_k = pack_k<T>, c.pack_v = pack_v<T>, c.kv_size = sizeof(T); }
template <class T> void set_thin(Convert& c) { c.thin_scores = Thin<T>::scores, c.thin_values = Thin<T>::values; }

void attention(const DgAttention* a) {
  Convert c{};
  switch (a->q_dtype) {
    case DG_BF16: set_q<bf16>(c); break;
    case DG_F16: set_q<f16>(c); break;
    default: set_q<float>(c);
  }
  switch (a->kv_dtype) {
    case DG_BF16: set_kv<bf16>(c), set_thin<bf16>(c); break;
    case DG_F16: set_kv<f16>(c), set_thin<f16>(c); break;
    case DG_I8: set_kv<int8_t>(c); break;
    case DG_E4M3: set_kv<e4m3>(c); break;
    default: set_kv<float>(c), set_thin<float>(c);
  }
  attend(*a, c);
}

}  // namespace
