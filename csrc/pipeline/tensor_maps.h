// What the copy engine is told of the operands of the sm_90 engine: matrices, and the boxes of them that
// fill a stage. Outside a matrix there are zeros.
#pragma once

#include <cuda.h>

namespace marlin {

struct TensorMaps {
  CUtensorMap x;       // m by k: rows by 64 columns, swizzled (format/swizzle.h)
  CUtensorMap words;   // k / 16 by n, two words each: a stage's rows of tiles by its columns
  CUtensorMap scales;  // groups by n: a stage's groups by its columns; none if per column
};

}  // namespace marlin
