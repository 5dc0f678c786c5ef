// The matrix unit of Intel's processors, AMX, where this processor has one and the system lets this
// process use it.
#pragma once

#include "kernels.h"

namespace adasplash2 {

// Null where there is none.
const MatrixUnit* amx();

}  // namespace adasplash2
