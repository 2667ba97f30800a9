// Run-time choice of the instruction set and the exported C symbols.
#include <cstdlib>
#include <cstring>
#include "table.h"

#define DG_EXPORT extern "C" __attribute__((visibility("default")))

extern const DgTable dg_table_base;
#if defined(DG_HAVE_AVX2)
extern const DgTable dg_table_avx2;
#endif
#if defined(DG_HAVE_AVX512)
extern const DgTable dg_table_avx512;
#endif

static bool usable(const DgTable* t) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!strcmp(t->name, "avx2"))
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (!strcmp(t->name, "avx512"))
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  return true;
}

static const DgTable* const tables[] = {
#if defined(DG_HAVE_AVX512)
    &dg_table_avx512,
#endif
#if defined(DG_HAVE_AVX2)
    &dg_table_avx2,
#endif
    &dg_table_base,
};
static const DgTable* table = nullptr;

// The i-th variant's name, best first, or null past the end; *ok says whether this machine can run it.
DG_EXPORT const char* dg_variant(int i, int32_t* ok) {
  if (i < 0 || i >= (int)(sizeof tables / sizeof *tables)) return nullptr;
  *ok = usable(tables[i]);
  return tables[i]->name;
}

// Choose a variant by name, or the best for null. Returns the name, or null when it is unknown or unusable here.
DG_EXPORT const char* dg_select(const char* name) {
  for (const DgTable* t : tables)
    if ((!name || !strcmp(name, t->name)) && usable(t)) {
      table = t;
      return t->name;
    }
  return nullptr;
}

DG_EXPORT void dg_attention(const DgAttention* a) { table->attention(a); }
DG_EXPORT void dg_write(const DgWrite* a) { table->ops->write(a); }
DG_EXPORT void dg_rope(const DgRope* a) { table->ops->rope(a); }
DG_EXPORT void dg_norm(const DgNorm* a) { table->ops->norm(a); }
DG_EXPORT void dg_linear(const DgLinear* a) { (*table->linear)(a); }

// The same ops with what stays fixed in a struct filled once, and what changes from call to call as arguments:
// through ctypes an argument costs a third of setting a field.

// `layer` has the cache and the layer's constants, `step` the batch.
DG_EXPORT void dg_attend(const DgAttention* layer, const DgAttention* step, const void* q, void* out, float* lse,
                         int64_t q_st, int64_t q_sh, int64_t o_st, int64_t o_sh) {
  DgAttention a = *layer;
  a.rows = step->rows, a.threads = step->threads, a.span = step->span;
  a.cu_q = step->cu_q, a.kv_len = step->kv_len, a.block_table = step->block_table, a.bt_sb = step->bt_sb;
  a.q = q, a.out = out, a.lse = lse;
  a.q_st = q_st, a.q_sh = q_sh, a.q_sd = 1;
  a.o_st = o_st, a.o_sh = o_sh, a.o_sd = 1;
  table->attention(&a);
}

DG_EXPORT void dg_store(const DgWrite* fixed, const void* k, const void* v, const int64_t* slots, int32_t tokens,
                        int64_t k_st, int64_t k_sh, int64_t v_st, int64_t v_sh) {
  DgWrite a = *fixed;
  a.k = k, a.v = v, a.slots = slots, a.tokens = tokens;
  a.k_st = k_st, a.k_sh = k_sh, a.v_st = v_st, a.v_sh = v_sh;
  table->ops->write(&a);
}

// Packed rows [H*D | K*D | K*Dv]; queries are normed and rotated in place.
DG_EXPORT void dg_qkv(const DgRope* fixed, void* qkv, const int64_t* positions, const int64_t* slots, int32_t tokens,
                      int64_t row, int32_t itemsize) {
  DgRope a = *fixed;
  const int64_t d = a.write.dim, k0 = a.heads * d, v0 = k0 + a.write.kv_heads * d;
  a.q = a.q_out = qkv;
  a.q_st = a.qo_st = row, a.q_sh = a.qo_sh = d;
  a.positions = positions;
  a.write.k = (char*)qkv + k0 * itemsize, a.write.v = (char*)qkv + v0 * itemsize;
  a.write.k_st = a.write.v_st = row, a.write.k_sh = d, a.write.v_sh = a.write.dim_v;
  a.write.slots = slots, a.write.tokens = tokens;
  table->ops->rope(&a);
}

// y = rms_norm(x) * w, or with a residual: residual += x first (kept), y = rms_norm(residual) * w; y may be x.
DG_EXPORT void dg_rms(const void* x, const void* w, void* residual, void* y, int32_t rows, int32_t n, int64_t x_st,
                      int64_t r_st, int64_t y_st, float eps, float offset, int32_t dtype, int32_t w_dtype) {
  const DgNorm a = {x, w, residual, residual, y, x_st, r_st, r_st, y_st, rows, n, dtype, w_dtype, offset, eps, {0, 0}};
  table->ops->norm(&a);
}

DG_EXPORT void dg_gated(const void* x, int64_t x_st, void* y, int64_t y_st, int32_t rows, int32_t n, int32_t dtype,
                        int32_t kind) {
  table->ops->gated(x, x_st, y, y_st, rows, n, dtype, kind);
}

DG_EXPORT void dg_argmax(const void* x, int64_t x_st, int64_t* y, int32_t rows, int64_t n, int32_t dtype) {
  table->ops->argmax(x, x_st, y, rows, n, dtype);
}

DG_EXPORT void dg_product(const DgLinear* fixed, const void* x, void* y, int32_t m, int64_t x_st, int32_t threads) {
  DgLinear a = *fixed;
  a.x = x, a.y = y, a.m = m, a.x_st = x_st, a.threads = threads;
  (*table->linear)(&a);
}
DG_EXPORT int64_t dg_sizeof(int which) {
  switch (which) {
    case 0: return sizeof(DgAttention);
    case 1: return sizeof(DgWrite);
    case 2: return sizeof(DgRope);
    case 3: return sizeof(DgNorm);
    case 4: return sizeof(DgLinear);
  }
  return 0;
}
