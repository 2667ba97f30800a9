// Products with packed weights: y = x W^T + bias, weights in float32, bf16, fp16, int8 or 4 bits, sums in float32.
//
// A weight [N, K] is stored as panels of 64 outputs, whatever the instruction set, with K padded to a multiple of 32:
//   f32, f16        [K][64]
//   bf16            [K/2][64] pairs (the even input in the low half)
//   int8 / channel  [K][64] int8, then scale[64] float32
//   int8 / group    per 32 inputs: scale[64] fp16, then [32][64] int8
//   int4 min        per 32 inputs: scale[64] fp16, minimum[64] fp16, then [4][64] words of 8 nibbles
//   int4 symmetric  per 32 inputs: scale[64] fp16, then [4][64] words of 8 nibbles (value minus 8)
// Few rows: each weight vector is decoded into a register and used for every row (`direct`). Many rows: a panel is
// decoded once into float32 and multiplied by register tiles (`dense`).
#pragma once
#include "abi.h"
#include "gemm.h"

namespace {

constexpr int kPanel = 64;
constexpr int kGroup = 32;
constexpr int kDirect = kManyRegisters ? 12 : 4;  // most rows decoded directly
constexpr int kDense = kManyRegisters ? 12 : 6;   // rows of a dense tile

DG_INLINE vf nibble(vi words, int j, vf lut) {
#if defined(__AVX512F__)
  return _mm512_permutexvar_ps(_mm512_srli_epi32((__m512i)words, 4 * j), lut);  // the index is the low four bits
#else
  (void)lut;
  return to_float((words >> (4 * j)) & 15);
#endif
}

DG_INLINE vf centred(vi words, int j, vf lut) {  // the code minus 8; lut holds that
#if defined(__AVX512F__)
  return nibble(words, j, lut);
#else
  (void)lut;
  return to_float(((words >> (4 * j)) & 15) - 8);
#endif
}

DG_INLINE vf nibble_table(int zero) {
  vf t{};
  for (int i = 0; i < W; i++) t[i] = (float)(i - zero);
  return t;
}

// Bytes of one panel.
DG_INLINE int64_t panel_bytes(int format, int64_t k) {
  switch (format) {
    case DG_W_F32: return k * kPanel * 4;
    case DG_W_BF16: case DG_W_F16: return k * kPanel * 2;
    case DG_W_I8_CHANNEL: return k * kPanel + kPanel * 4;
    case DG_W_I8_GROUP: return k / kGroup * (kPanel * 2 + kGroup * kPanel);
    case DG_W_I4_MIN: return k / kGroup * (kPanel * 4 + kGroup * kPanel / 2);
    case DG_W_I4_SYM: return k / kGroup * (kPanel * 2 + kGroup * kPanel / 2);
  }
  return 0;
}

// The input a decoded vector belongs to; its parity is known to the compiler and picks a chain of sums.
template <int Odd> struct At {
  static constexpr int odd = Odd;
  int at;
};

template <int F> struct Stored { typedef int8_t type; };
template <> struct Stored<DG_W_F32> { typedef float type; };
template <> struct Stored<DG_W_F16> { typedef f16 type; };

// Ask for the weights that come kAhead bytes after one group. The processor's own prefetcher stops at each 4 KiB page;
// with few rows, where memory sets the pace, this alone is worth a factor of 1.5. Running past the end is harmless.
constexpr int kAhead = 4096;
DG_INLINE void ahead(const char* group, int64_t bytes) {
  for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(group + kAhead + line);
}

// Decode one group of 32 inputs at columns [col, col + NV*W): use(at, w[NV]) for at.at in 0..31.
template <int F, int NV, class Use>
DG_INLINE void decode(const char* panel, int64_t group, int col, Use use) {
  vf w[NV];
  if constexpr (F == DG_W_BF16) {
    const char* p = panel + group * kGroup * kPanel * 2 + col * 4;
    for (int i = 0; i < kGroup; i += 2) {
      vu x[NV];
      each<NV>(DG_EACH(v) { memcpy(&x[v], p + i * kPanel * 2 + v * W * 4, W * 4); });
      each<NV>(DG_EACH(v) { w[v] = bits_f(x[v] << 16); });
      use(At<0>{i}, w);
      each<NV>(DG_EACH(v) { w[v] = bits_f(x[v] & 0xffff0000u); });
      use(At<1>{i + 1}, w);
    }
  } else if constexpr (F == DG_W_I4_MIN || F == DG_W_I4_SYM) {
    constexpr bool minimum = F == DG_W_I4_MIN;
    constexpr int head = minimum ? kPanel * 4 : kPanel * 2;
    const char* g = panel + group * (head + kGroup * kPanel / 2);
    const vf lut = nibble_table(minimum ? 0 : 8);
    vf d[NV], m[NV];
    each<NV>(DG_EACH(v) {
      d[v] = load((const f16*)g + col + v * W);
      m[v] = minimum ? load((const f16*)g + kPanel + col + v * W) : W == 16 ? vf{} : d[v] * set1(-8.f);
    });
    for (int i = 0; i < kGroup; i += 8) {
      vi x[NV];
      each<NV>(DG_EACH(v) { memcpy(&x[v], g + head + i * (kPanel / 2) + (col + v * W) * 4, W * 4); });
      each<8>(DG_EACH(j) {
        each<NV>(DG_EACH(v) {
          w[v] = minimum || W != 16 ? fma(nibble(x[v], j, lut), d[v], m[v]) : nibble(x[v], j, lut) * d[v];
        });
        use(At<decltype(j)::value % 2>{i + j}, w);
      });
    }
  } else {
    typedef typename Stored<F>::type T;
    const char* g = panel + group * (F == DG_W_I8_GROUP ? kPanel * 2 + kGroup * kPanel : kGroup * kPanel * (int)sizeof(T));
    vf d[NV];
    if (F == DG_W_I8_GROUP) each<NV>(DG_EACH(v) { d[v] = load((const f16*)g + col + v * W); });
    const T* p = (const T*)(F == DG_W_I8_GROUP ? g + kPanel * 2 : g) + col;
    for (int i = 0; i < kGroup; i += 2)
      each<2>(DG_EACH(j) {
        each<NV>(DG_EACH(v) {
          w[v] = load(p + (i + j) * kPanel + v * W);
          if (F == DG_W_I8_GROUP) w[v] *= d[v];
        });
        use(At<decltype(j)::value % 2>{i + j}, w);
      });
  }
}

struct Product {
  DgLinear a;
  const float* x;     // packed rows: tiles of `tile_rows`, each [K][tile_rows]
  const float* sums;  // few rows of 4-bit weights: sums of x over each group [K/32][tile_rows], else null
  int64_t k_pad, panel;
  int tile_rows;
};

// Rows row0 … of one panel: r [rows][64] float32 plus bias, converted and cut to the output's width.
template <class Y> void put_as(const Product& p, int64_t index, int64_t row0, int rows, const float* r) {
  const int64_t col0 = index * kPanel;
  const int64_t cols = p.a.n - col0 < kPanel ? p.a.n - col0 : kPanel;
  for (int i = 0; i < rows && row0 + i < p.a.m; i++) {
    Y* y = (Y*)p.a.y + (row0 + i) * p.a.y_st + col0;
    for (int c = 0; c < cols; c += W) {
      vf x = load(r + i * kPanel + c);
      if (p.a.bias) x += load(p.a.bias + col0 + c);
      if (c + W <= cols) store(y + c, x);
      else store_n(y + c, x, (int)cols - c);
    }
  }
}
inline void put_rows(const Product& p, int64_t index, int64_t row0, int rows, const float* r) {
  switch (p.a.y_dtype) {
    case DG_F32: return put_as<float>(p, index, row0, rows, r);
    case DG_BF16: return put_as<bf16>(p, index, row0, rows, r);
    case DG_F16: return put_as<f16>(p, index, row0, rows, r);
  }
}

DG_INLINE const float* channel_scale(const Product& p, const char* panel) {
  return (const float*)(panel + p.k_pad * kPanel);
}

template <int F, int R, int NV> void direct(const Product& p, const char* panel, const float* xt, float* out) {
  constexpr int S = R * NV <= 4 ? 2 : 1;  // more chains where one per output would wait for the adder
  for (int col = 0; col < kPanel; col += NV * W) {
    vf acc[S][R][NV];
    each<S>(DG_EACH(c) { each<R>(DG_EACH(r) { each<NV>(DG_EACH(v) { acc[c][r][v] = vf{}; }); }); });
    const float* x = xt;
    const int64_t groups = p.k_pad / kGroup, bytes = p.panel / groups;
    for (int64_t g = 0; g < groups; g++, x += kGroup * R) {
      if (col == 0) ahead(panel + g * bytes, bytes);
      decode<F, NV>(panel, g, col, [&](auto i, const vf* w) __attribute__((always_inline)) {
        each<R>(DG_EACH(r) {
          const vf xv = set1(x[i.at * R + r]);
          each<NV>(DG_EACH(v) {
            vf& sum = acc[S == 2 ? decltype(i)::odd : 0][r][v];
            sum = fma(xv, w[v], sum);
          });
        });
      });
    }
    each<R>(DG_EACH(r) {
      each<NV>(DG_EACH(v) {
        vf y = S == 2 ? acc[0][r][v] + acc[S - 1][r][v] : acc[0][r][v];
        if (F == DG_W_I8_CHANNEL) y *= load(channel_scale(p, panel) + col + v * W);
        store(out + r * kPanel + col + v * W, y);
      });
    });
  }
}

// Four bits and very few rows: sums of (code - 8) * x per group, to which scale and minimum are applied once. One
// operation per weight less than decoding, which is what counts until there are rows to share it. Codes are centred
// so that the two terms do not cancel.
template <int F, int R, int NV> void direct_codes(const Product& p, const char* panel, const float* xt, float* out) {
  constexpr bool minimum = F == DG_W_I4_MIN;
  constexpr int head = minimum ? kPanel * 4 : kPanel * 2;
  constexpr int S = R * NV <= 4 ? 2 : 1;
  const vf lut = nibble_table(8);
  for (int col = 0; col < kPanel; col += NV * W) {
    vf y[R][NV];
    each<R>(DG_EACH(r) { each<NV>(DG_EACH(v) { y[r][v] = vf{}; }); });
    const float *x = xt, *sums = p.sums;
    const char* g = panel;
    for (int64_t group = 0; group < p.k_pad / kGroup; group++, x += kGroup * R, sums += R, g += head + kGroup * kPanel / 2) {
      vf acc[S][R][NV];
      each<S>(DG_EACH(c) { each<R>(DG_EACH(r) { each<NV>(DG_EACH(v) { acc[c][r][v] = vf{}; }); }); });
      if (col == 0) ahead(g, head + kGroup * kPanel / 2);
      each<4>(DG_EACH(word) {
        vi codes[NV];
        each<NV>(DG_EACH(v) { memcpy(&codes[v], g + head + word * (kPanel * 4) + (col + v * W) * 4, W * 4); });
        each<8>(DG_EACH(j) {
          each<R>(DG_EACH(r) {
            const vf xv = set1(x[(word * 8 + j) * R + r]);
            each<NV>(DG_EACH(v) {
              vf& sum = acc[j % S][r][v];
              sum = fma(centred(codes[v], j, lut), xv, sum);
            });
          });
        });
      });
      each<NV>(DG_EACH(v) {
        const vf d = load((const f16*)g + col + v * W);
        const vf m = minimum ? fma(d, set1(8.f), load((const f16*)g + kPanel + col + v * W)) : vf{};
        each<R>(DG_EACH(r) {
          const vf total = S == 2 ? acc[0][r][v] + acc[S - 1][r][v] : acc[0][r][v];
          y[r][v] = fma(total, d, y[r][v]);
          if (minimum) y[r][v] = fma(m, set1(sums[r]), y[r][v]);
        });
      });
    }
    each<R>(DG_EACH(r) { each<NV>(DG_EACH(v) { store(out + r * kPanel + col + v * W, y[r][v]); }); });
  }
}

template <int F, int R, int NV> DG_INLINE void few(const Product& p, const char* panel, const float* xt, float* out) {
  if constexpr (F == DG_W_I4_MIN || F == DG_W_I4_SYM) direct_codes<F, R, (R >= 4 && NV > 2 ? 2 : NV)>(p, panel, xt, out);
  else direct<F, R, NV>(p, panel, xt, out);
}

// b [K][64] float32.
template <int R> void dense_tile(const float* xt, const float* b, int64_t k, float* out) {
  for (int col = 0; col < kPanel; col += 2 * W)
    tile<R, 2, 1, R>(xt, b + col, kPanel, k, [&](int r, int v, vf y) { store(out + r * kPanel + col + v * W, y); });
}

template <int F> void unpack_panel(const Product& p, const char* panel, float* out) {
  for (int64_t g = 0; g < p.k_pad / kGroup; g++)
    for (int col = 0; col < kPanel; col += 2 * W) {
      vf scale[2];
      for (int v = 0; v < 2; v++)
        scale[v] = F == DG_W_I8_CHANNEL ? load(channel_scale(p, panel) + col + v * W) : set1(1.f);
      decode<F, 2>(panel, g, col, [&](auto i, const vf* w) __attribute__((always_inline)) {
        float* at = out + (g * kGroup + i.at) * kPanel + col;
        store(at, F == DG_W_I8_CHANNEL ? w[0] * scale[0] : w[0]);
        store(at + W, F == DG_W_I8_CHANNEL ? w[1] * scale[1] : w[1]);
      });
    }
}

// The tile heights there is code for.
DG_INLINE int tile_height(int64_t rows, bool dense) {
  if (dense) return rows <= 4 ? 4 : rows <= 6 ? 6 : rows <= 8 ? 8 : 12;
  return rows <= 1 ? 1 : rows <= 2 ? 2 : rows <= 4 ? 4 : rows <= 8 ? 8 : 12;
}

template <int F> void product_panel(void* ctx, int64_t index) {
  const Product& p = *(const Product*)ctx;
  const char* panel = (const char*)p.a.w + index * p.panel;
  const float* x = p.x;
  constexpr int NV = W == 16 ? 4 : 2;
  alignas(64) float out[12 * kPanel];
  if (p.a.m <= kDirect) {
    switch (p.tile_rows) {
      case 1: few<F, 1, NV>(p, panel, x, out); break;
      case 2: few<F, 2, NV>(p, panel, x, out); break;
      case 4: few<F, 4, NV>(p, panel, x, out); break;
#if defined(__AVX512F__) || defined(__aarch64__)
      case 8: direct<F, 8, 2>(p, panel, x, out); break;
      case 12: direct<F, 12, 2>(p, panel, x, out); break;
#endif
    }
    return put_rows(p, index, 0, p.tile_rows, out);
  }
  float* b = (float*)dg_scratch(0, sizeof(float) * p.k_pad * kPanel);
  unpack_panel<F>(p, panel, b);
  for (int64_t row = 0; row < p.a.m; row += p.tile_rows, x += p.tile_rows * p.k_pad) {
    switch (p.tile_rows) {
      case 4: dense_tile<4>(x, b, p.k_pad, out); break;
      case 6: dense_tile<6>(x, b, p.k_pad, out); break;
#if defined(__AVX512F__) || defined(__aarch64__)
      case 8: dense_tile<8>(x, b, p.k_pad, out); break;
      case 12: dense_tile<12>(x, b, p.k_pad, out); break;
#endif
    }
    put_rows(p, index, row, p.tile_rows, out);
  }
}

// Rows to tiles [K][R], converted to float32, rows and inputs past the end zero.
template <class X> void pack_rows(const DgLinear& a, int64_t k_pad, int R, float* out) {
  const X* x = (const X*)a.x;
  for (int64_t row0 = 0; row0 < a.m; row0 += R, out += R * k_pad) {
    const int rows = a.m - row0 < R ? (int)(a.m - row0) : R;
    if (R == 1) {
      int64_t i = 0;
      for (; i + W <= a.k; i += W) store(out + i, load(x + row0 * a.x_st + i));
      for (; i < a.k; i++) out[i] = scalar(x[row0 * a.x_st + i]);
      for (; i < k_pad; i++) out[i] = 0.f;
      continue;
    }
    if (rows < R || a.k < k_pad) memset(out, 0, sizeof(float) * R * k_pad);
    for (int r = 0; r < rows; r++) {
      const X* from = x + (row0 + r) * a.x_st;
      for (int64_t i = 0; i < a.k; i++) out[i * R + r] = scalar(from[i]);
    }
  }
}

template <int F> void run_format(Product& p) {
  dg_parallel((p.a.n + kPanel - 1) / kPanel, p.a.threads, product_panel<F>, &p);
}

void linear(const DgLinear* a) {
  if (a->m <= 0) return;
  Product p;
  p.a = *a;
  p.k_pad = ((int64_t)a->k + kGroup - 1) / kGroup * kGroup;
  p.panel = panel_bytes(a->format, p.k_pad);
  if (a->m <= kDirect) {
    p.tile_rows = tile_height(a->m, false);
  } else {
    const int64_t tiles = ((int64_t)a->m + kDense - 1) / kDense;
    p.tile_rows = tile_height((a->m + tiles - 1) / tiles, true);
  }
  const int64_t rows = ((int64_t)a->m + p.tile_rows - 1) / p.tile_rows * p.tile_rows;
  float* x = (float*)dg_scratch(1, sizeof(float) * rows * (p.k_pad + p.k_pad / kGroup));
  p.x = x;
  p.sums = nullptr;
  switch (a->x_dtype) {
    case DG_F32: pack_rows<float>(*a, p.k_pad, p.tile_rows, x); break;
    case DG_BF16: pack_rows<bf16>(*a, p.k_pad, p.tile_rows, x); break;
    case DG_F16: pack_rows<f16>(*a, p.k_pad, p.tile_rows, x); break;
  }
  if (a->m <= 4 && (a->format == DG_W_I4_MIN || a->format == DG_W_I4_SYM)) {
    float* sums = x + rows * p.k_pad;
    p.sums = sums;
    const int R = p.tile_rows;
    for (int64_t g = 0; g < p.k_pad / kGroup; g++)
      for (int r = 0; r < R; r++) {
        float sum = 0.f;
        for (int i = 0; i < kGroup; i++) sum += x[(g * kGroup + i) * R + r];
        sums[g * R + r] = sum;
      }
  }
  switch (a->format) {
    case DG_W_F32: return run_format<DG_W_F32>(p);
    case DG_W_BF16: return run_format<DG_W_BF16>(p);
    case DG_W_F16: return run_format<DG_W_F16>(p);
    case DG_W_I8_CHANNEL: return run_format<DG_W_I8_CHANNEL>(p);
    case DG_W_I8_GROUP: return run_format<DG_W_I8_GROUP>(p);
    case DG_W_I4_MIN: return run_format<DG_W_I4_MIN>(p);
    case DG_W_I4_SYM: return run_format<DG_W_I4_SYM>(p);
  }
}

}  // namespace
