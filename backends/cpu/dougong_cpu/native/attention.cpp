// Compiled once per instruction set: DG_ISA names it.
#include "attention.h"
#include "table.h"

extern const DgTable DG_SYMBOL(dg_table_);
extern const DgOps DG_SYMBOL(dg_ops_);
extern void (*const DG_SYMBOL(dg_linear_))(const DgLinear*);

const DgTable DG_SYMBOL(dg_table_) = {DG_TEXT(DG_ISA), attention, &DG_SYMBOL(dg_ops_), &DG_SYMBOL(dg_linear_)};
