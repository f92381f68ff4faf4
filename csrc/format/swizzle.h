// Where data lies in shared memory, so that no two lanes of an access meet in a bank.
#pragma once

namespace marlin {

// Rows of 128 bytes in eight 16-byte chunks, read eight rows of one chunk at a time (ldmatrix):
// chunk c of row r lies at place c ^ (r % 8), so those eight reads touch all 32 banks.
inline constexpr int kSwizzleChunks = 8;
inline constexpr int kPanelColumns = 64;  // 16-bit elements in such a row
constexpr int swizzled_chunk(int row, int chunk) { return chunk ^ (row % kSwizzleChunks); }

}  // namespace marlin
