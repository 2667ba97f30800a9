// Compiled once per instruction set, with DG_TABLE naming the exported table.
#include "attention.h"
#include "linear.h"
#include "ops.h"

#define DG_STR2(x) #x
#define DG_STR(x) DG_STR2(x)
extern const DgTable DG_TABLE;
const DgTable DG_TABLE = {DG_STR(DG_NAME), attention, write_cache, rope, norm, gated, linear};
