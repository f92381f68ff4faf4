// The column loop (core/columns.h) for some outputs, a vector of them at a time. Included by
// kernels.inl, inside its namespace.
//
// Inputs come in blocks whose work stays in registers: what earlier blocks did to them is applied
// first, then the block is rounded input by input.

inline constexpr int kBlockRows = Isa::kRegisters / 2;

inline Wide load_lanes(const float* source, int64_t count) {
  Wide value{};
  std::memcpy(&value, source, sizeof(float) * std::min<int64_t>(count, Isa::kLanes));
  return value;
}

inline void store_lanes(float* target, Wide value, int64_t count) {
  std::memcpy(target, &value, sizeof(float) * std::min<int64_t>(count, Isa::kLanes));
}

// The code of `value` less 8, as a float: nearest, ties to even.
inline Wide nearest_level(Wide value, Wide divisor) {
  Wide level = value / divisor;
  level = level < -8.0f ? Wide{} - 8.0f : level;
  level = level > 7.0f ? Wide{} + 7.0f : level;
  constexpr float kRound = 12582912.0f;  // 1.5 · 2²³: sums with it have no fraction
  return (level + kRound) - kRound;
}

// Rounds outputs column … column + lanes - 1; `visit(row, level, moved)` hears of every input.
template <typename Visit>
inline void round_lanes(const ColumnSegment& segment, const float* current, Wide scale,
                        int64_t column, const Visit& visit) {
  const int64_t lanes = segment.n - column;
  const Wide divisor = scale == 0.0f ? Wide{} + __builtin_inff() : scale;
  Wide moved[kMaxSegmentRows];
  for (int first = 0; first < segment.rows; first += kBlockRows) {
    const int rows = std::min(kBlockRows, segment.rows - first);
    Wide work[kBlockRows];
#pragma GCC unroll 16
    for (int i = 0; i < kBlockRows; ++i)
      work[i] =
          i < rows ? load_lanes(segment.work + (first + i) * segment.n + column, lanes) : Wide{};
    const float* coupling = segment.coupling + first;
    if (rows == kBlockRows) {
      for (int j = 0; j < first; ++j) {
        const float* row = coupling + j * segment.coupling_pitch;
#pragma GCC unroll 16
        for (int i = 0; i < kBlockRows; ++i) work[i] -= row[i] * moved[j];
      }
    } else {
      for (int j = 0; j < first; ++j)
        for (int i = 0; i < rows; ++i)
          work[i] -= coupling[j * segment.coupling_pitch + i] * moved[j];
    }
    for (int j = 0; j < rows; ++j) {
      const Wide level = nearest_level(work[j], divisor);
      const Wide before =
          current ? load_lanes(current + (first + j) * segment.n + column, lanes) : work[j];
      const Wide distance = before - level * scale;
      moved[first + j] = distance;
      visit(first + j, level, distance);
      const float* row = coupling + (first + j) * segment.coupling_pitch;
      for (int i = j + 1; i < rows; ++i) work[i] -= row[i] * distance;
    }
  }
}

void quantize_columns(const ColumnsParams& params, int64_t first, int64_t last) {
  const int64_t n = params.segment.n;
  for (int64_t column = first; column < last; column += Isa::kLanes) {
    const Wide scale = load_lanes(params.scale + column, n - column);
    round_lanes(params.segment, params.current, scale, column,
                [&](int row, Wide level, Wide moved) {
                  store_lanes(params.codes + row * n + column, level + 8.0f, n - column);
                  store_lanes(params.moved + row * n + column, moved, n - column);
                });
  }
}

void trial_losses(const TrialParams& params, int64_t first, int64_t last) {
  const int64_t n = params.segment.n;
  for (int64_t column = first; column < last; column += Isa::kLanes) {
    for (int64_t candidate = 0; candidate < params.candidates; ++candidate) {
      const Wide scale = load_lanes(params.scales + candidate * n + column, n - column);
      Wide loss{};
      round_lanes(params.segment, nullptr, scale, column, [&](int row, Wide, Wide moved) {
        loss += params.weights[row] * (moved * moved);
      });
      store_lanes(params.losses + candidate * n + column, loss, n - column);
    }
  }
}
