// Compiled once per instruction set: DG_ISA names it.
#include "ops.h"
#include "table.h"

extern const DgOps DG_SYMBOL(dg_ops_);
const DgOps DG_SYMBOL(dg_ops_) = {write_cache, rope, norm, gated, argmax};
