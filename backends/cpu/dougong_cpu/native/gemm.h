// The one matrix micro-kernel: C[R, NV*W] = A[R, k] B[k, NV*W], held in registers over the whole k.
//
// A is read by broadcast at a[r * RS + i * KS] (constants, so the addresses become displacements), B by whole
// vectors at b[i * ldb]. Lanes never mix, so a row's bits do not depend on R, on NV or on its neighbours.
#pragma once
#include "vec.h"

namespace {

template <int R, int NV, int RS, int KS, class Done>
DG_INLINE void tile(const float* a, const float* b, int64_t ldb, int64_t k, Done done) {
  vf acc[R][NV];
  each<R>(DG_EACH(r) { each<NV>(DG_EACH(v) { acc[r][v] = vf{}; }); });
  for (int64_t i = 0; i < k; i++) {
    vf bv[NV];
    each<NV>(DG_EACH(v) { bv[v] = load(b + v * W); });
    each<R>(DG_EACH(r) {
      const vf av = set1(a[r * RS]);
      each<NV>(DG_EACH(v) { acc[r][v] = fma(av, bv[v], acc[r][v]); });
    });
    a += KS;
    b += ldb;
  }
  each<R>(DG_EACH(r) { each<NV>(DG_EACH(v) { done(r, v, acc[r][v]); }); });
}

}  // namespace
