// The path for few queries (decode, short drafts): keys and values are read where they lie, without a float32 copy.
// Up to kThin rows of one kv head, head dims that fill whole vectors, elements side by side.
#pragma once
#include "vec.h"

namespace {

constexpr int kThin = 12;

// Sums of W vectors, one per lane: a transposing tree of adds.
DG_INLINE vf sums(vf* x) {
  typename make_seq<W>::type s;
#pragma GCC unroll 4
  for (int n = W; n > 1; n /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < n / 2; i++) x[i] = zip_lo(x[i], x[i + n / 2], s) + zip_hi(x[i], x[i + n / 2], s);
  return x[0];
}

// s[r * ls + key] = q[r] . key for n keys (rounded up to W: the rest 0); q [R][dim] float32.
template <class T, int R>
void thin_scores(const float* q, const void* const* key, int n, int dim, float* s, int ls) {
  constexpr int U = kManyRegisters && R <= 4 ? 4 : 2;  // keys at a time, so that a query vector is loaded once for all
  for (int k0 = 0; k0 < n; k0 += W) {
    vf part[R][W];
    for (int k = 0; k < W; k += U) {
      const T* p[U];
      const int left = n - k0 - k;
      if (left <= 0) {
        for (int r = 0; r < R; r++)
          for (int u = 0; u < U; u++) part[r][k + u] = vf{};
        continue;
      }
      each<U>(DG_EACH(u) { p[u] = (const T*)key[k0 + k + (u < left ? u : 0)]; });  // a key read twice is dropped below
      vf acc[R][U];
      each<R>(DG_EACH(r) { each<U>(DG_EACH(u) { acc[r][u] = vf{}; }); });
      for (int d = 0; d < dim; d += W) {
        vf kv[U];
        each<U>(DG_EACH(u) { kv[u] = load(p[u] + d); });
        each<R>(DG_EACH(r) {
          const vf qv = load(q + r * dim + d);
          each<U>(DG_EACH(u) { acc[r][u] = fma(qv, kv[u], acc[r][u]); });
        });
      }
      each<R>(DG_EACH(r) { each<U>(DG_EACH(u) { part[r][k + u] = u < left ? acc[r][u] : vf{}; }); });
    }
    for (int r = 0; r < R; r++) store(s + r * ls + k0, sums(part[r]));
  }
}

// o[r] += sum over keys of p[r * lp + key] * value; o [R][dim] float32.
template <class T, int R, int NV>
DG_INLINE void thin_strip(const float* p, int lp, const void* const* key, int n, int d, int dim, float* o) {
  vf acc[R][NV];
  each<R>(DG_EACH(r) { each<NV>(DG_EACH(v) { acc[r][v] = vf{}; }); });
  for (int k = 0; k < n; k++) {
    const T* at = (const T*)key[k] + d;
    vf x[NV];
    each<NV>(DG_EACH(v) { x[v] = load(at + v * W); });
    each<R>(DG_EACH(r) {
      const vf w = set1(p[r * lp + k]);
      each<NV>(DG_EACH(v) { acc[r][v] = fma(w, x[v], acc[r][v]); });
    });
  }
  each<R>(DG_EACH(r) {
    each<NV>(DG_EACH(v) {
      float* at = o + r * dim + d + v * W;
      store(at, load(at) + acc[r][v]);
    });
  });
}
template <class T, int R> void thin_values(const float* p, int lp, const void* const* key, int n, int dim, float* o) {
  constexpr int NV = kManyRegisters ? 4 : R <= 4 ? 2 : 1;
  int d = 0;
  for (; d + NV * W <= dim; d += NV * W) thin_strip<T, R, NV>(p, lp, key, n, d, dim, o);
  for (; d < dim; d += W) thin_strip<T, R, 1>(p, lp, key, n, d, dim, o);
}

typedef void (*ThinScores)(const float*, const void* const*, int, int, float*, int);
typedef void (*ThinValues)(const float*, int, const void* const*, int, int, float*);
template <class T> struct Thin {
  static ThinScores scores(int rows) {
    static const ThinScores f[] = {thin_scores<T, 1>, thin_scores<T, 2>, thin_scores<T, 3>, thin_scores<T, 4>};
    return f[rows - 1];
  }
  static ThinValues values(int rows) {
    static const ThinValues f[] = {thin_values<T, 1>, thin_values<T, 2>, thin_values<T, 3>, thin_values<T, 4>};
    return f[rows - 1];
  }
};
constexpr int kThinTile = 4;

}  // namespace
