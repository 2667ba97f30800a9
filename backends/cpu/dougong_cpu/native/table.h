// What one instruction set's objects hand to the dispatcher.
#pragma once
#include "abi.h"

struct DgOps {
  void (*write)(const DgWrite*);
  void (*rope)(const DgRope*);
  void (*norm)(const DgNorm*);
  void (*gated)(const void* x, int64_t x_st, void* y, int64_t y_st, int32_t rows, int32_t n, int32_t dtype, int32_t kind);
  void (*argmax)(const void* x, int64_t x_st, int64_t* y, int32_t rows, int64_t n, int32_t dtype);
};

struct DgTable {
  const char* name;
  void (*attention)(const DgAttention*);
  const DgOps* ops;
  void (*const* linear)(const DgLinear*);
};

#define DG_JOIN2(a, b) a##b
#define DG_JOIN(a, b) DG_JOIN2(a, b)
#define DG_TEXT2(a) #a
#define DG_TEXT(a) DG_TEXT2(a)
#define DG_SYMBOL(prefix) DG_JOIN(prefix, DG_ISA)
