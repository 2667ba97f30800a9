// The plain C ABI: plain structs of pointers, strides (in elements) and sizes, mirrored by ctypes in ../_abi.py.
// Fields are ordered by size so that there is no padding to disagree about.
#pragma once
#include <cstdint>

enum DgDtype : int32_t { DG_F32 = 0, DG_BF16 = 1, DG_F16 = 2, DG_I8 = 3, DG_E4M3 = 4 };

struct DgAttention {
  const void *q, *k, *v;        // q [T,H,D]; k, v: paged [blocks,N,K,D] or ragged [Tk,K,D], by strides
  void* out;                    // [T,H,Dv]
  float* lse;                   // [T,H] or null
  const int32_t *cu_q, *kv_len; // [B+1], [B]; ragged: kv_len is null and cu_k [B+1] gives lengths and places
  const int32_t *block_table, *cu_k;
  const float *slopes, *sinks;  // [H] or null
  const float *k_scale, *v_scale;  // per kv head (stride 1) or one value (stride 0); null means 1
  int64_t q_st, q_sh, q_sd;
  int64_t k_sb, k_sn, k_sh, k_sd;  // ragged: sn is the token stride
  int64_t v_sb, v_sn, v_sh, v_sd;
  int64_t o_st, o_sh, o_sd;
  int64_t lse_st, lse_sh;
  int64_t bt_sb;                // row stride of the block table
  int32_t rows, heads, kv_heads, dim, dim_v, block;
  int32_t q_dtype, kv_dtype, causal, window;  // window 0: none
  int32_t k_scale_stride, v_scale_stride;
  float scale, softcap;         // softcap 0: none
  int32_t threads, span;        // span: keys per split of a one-tile row (0: default)
};

struct DgWrite {  // store k, v [T,K,D] at slots; q_dtype → cache dtype
  const void *k, *v;
  void *k_cache, *v_cache;
  const int64_t* slots;
  const float *k_scale, *v_scale;
  int64_t k_st, k_sh, v_st, v_sh;
  int64_t kc_sb, kc_sn, kc_sh, kc_sd, vc_sb, vc_sn, vc_sh, vc_sd;
  int32_t tokens, kv_heads, dim, dim_v, block, dtype, cache_dtype, k_scale_stride, v_scale_stride, reserved;
};

struct DgRope {   // QK-norm (optional), rope, and cache write of one packed qkv (DgWrite's v side included)
  DgWrite write;  // write.k, write.v: the k and v parts of qkv
  const void* q;
  void* q_out;    // [T,H,D]
  const float *cos, *sin;      // [max_position, rot/2] float32 tables
  const int64_t* positions;    // [T]
  const void *q_norm, *k_norm; // [D] in the model dtype, or null
  int64_t q_st, q_sh, qo_st, qo_sh, table_stride;
  int32_t heads, rotary_dim, interleaved;
  float norm_offset, eps;  // as DgNorm's offset
  int32_t write_cache, norm_dtype, reserved;
};

struct DgNorm {  // y = norm(x [+ residual]) * w; rows of n elements
  const void *x, *w;
  void *residual_in, *residual_out, *y;
  int64_t x_st, r_st, ro_st, y_st;
  int32_t rows, n, dtype, w_dtype;
  float offset, eps;  // offset 0: the normalised value is rounded before it is multiplied
  int32_t reserved[2];
};

struct DgLinear {  // y[M,N] = x[M,K] W^T + bias
  const void *x, *w;
  const float* bias;  // [N padded] or null
  void* y;
  int64_t x_st, y_st;
  int32_t m, n, k, x_dtype, y_dtype, format, group, threads;
};

enum DgFormat : int32_t {
  DG_W_F32 = 0, DG_W_BF16 = 1, DG_W_F16 = 2,
  DG_W_I8_CHANNEL = 3,  // int8, one float32 scale per output
  DG_W_I8_GROUP = 4,    // int8, fp16 scale per 32 inputs (GGUF Q8_0)
  DG_W_I4_MIN = 5,      // 4 bits, fp16 scale and minimum per 32 inputs (GGUF Q4_1)
  DG_W_I4_SYM = 6,      // 4 bits minus 8, fp16 scale per 32 inputs (GGUF Q4_0)
};

// Runs body(ctx, i) for i in [0, n) on up to `threads` threads; defined in pool.cpp.
void dg_parallel(int64_t n, int threads, void (*body)(void*, int64_t), void* ctx);
// A per-thread buffer of at least `bytes`, 64-byte aligned, kept for the next call; `which` in 0..3.
void* dg_scratch(int which, int64_t bytes);
