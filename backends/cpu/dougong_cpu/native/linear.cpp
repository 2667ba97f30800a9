// Compiled once per instruction set: DG_ISA names it.
#include "linear.h"
#include "table.h"

extern void (*const DG_SYMBOL(dg_linear_))(const DgLinear*);
void (*const DG_SYMBOL(dg_linear_))(const DgLinear*) = linear;
