// Read bandwidth as the kernels could reach it: the same threads, the same 64-byte steps, nothing but loads.
#include "../kernels.h"
#include "parallel.h"
