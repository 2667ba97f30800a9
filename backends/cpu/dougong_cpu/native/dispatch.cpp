// Run-time choice of the instruction set and the exported C symbols.
#include <cstdlib>
#include <cstring>
#include "abi.h"

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
DG_EXPORT void dg_write(const DgWrite* a) { table->write(a); }
DG_EXPORT void dg_rope(const DgRope* a) { table->rope(a); }
DG_EXPORT void dg_norm(const DgNorm* a) { table->norm(a); }
DG_EXPORT void dg_gated(const void* x, int64_t x_st, void* y, int64_t y_st, int32_t rows, int32_t n, int32_t dtype,
                        int32_t kind) {
  table->gated(x, x_st, y, y_st, rows, n, dtype, kind);
}
DG_EXPORT void dg_linear(const DgLinear* a) { table->linear(a); }
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
