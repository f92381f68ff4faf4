// Who computes what: an equal share of the tiles for every CTA, whatever the shape.
//
// The output is cut into slices (a strip of columns by a tile of rows); each slice is `depth` tiles
// long along k. A CTA, or two twins (core/config.h), take one run. While there are slices enough
// for all runs, they are dealt out whole, in turn: at any time all CTAs are in neighbouring slices,
// at about the same k, so that what they read is in L2. The tiles of the slices left form one line,
// which is cut into `runs` equal pieces: a run walks down a slice and perhaps on into the next.
//
//   slice left   0            1            2
//   tiles   [ . . . . . ][ . . . . . ][ . . . . . ]
//   runs    [  0   ][  1    ][  2   ][   3        ]
//
// A slice that several runs touch needs their sums added: the run that holds the slice's head owns
// it and adds the others' partial sums in the order of the runs. Every run has at most one segment
// that it does not own (its first of the line), and at most one slice that it owns and shares (its
// last): one buffer and one counter per run suffice. With runs = slices * s this is an even split by s.
#pragma once

#include <cstdint>

namespace marlin {

// The part of a slice that one run covers: tiles [first, last) of the slice. (32 bits number the slices
// of any Y that a GPU could hold.)
struct Segment {
  int slice = 0;
  int first = 0;
  int last = 0;

  constexpr bool operator==(const Segment&) const = default;
};

// Who else works on the slice of a segment.
struct Sharing {
  int contributors;  // runs that touch the slice
  int order;         // the run's place among them; 0 owns the slice

  constexpr bool owner() const { return order == 0; }
  constexpr bool shared() const { return contributors > 1; }
  constexpr bool operator==(const Sharing&) const = default;
};

inline constexpr int kMostRuns = 65535;  // that share the line

struct Partition {
  int64_t slices;
  int depth;  // tiles per slice
  int runs;
  int dealt;          // slices that go whole to the runs in turn
  int line_runs;      // the first so many runs share the line: no more than it has tiles
  int64_t run_tiles;  // of each of them, before what is left is shared out
  int left;

  constexpr Partition(int64_t slices, int depth, int runs)
      : slices(slices),
        depth(depth),
        runs(runs),
        dealt(static_cast<int>(slices / runs * runs)),
        line_runs(line_tiles() < runs ? static_cast<int>(line_tiles()) : runs),
        run_tiles(line_runs == 0 ? 0 : line_tiles() / line_runs),
        left(line_runs == 0 ? 0 : static_cast<int>(line_tiles() % line_runs)) {}

  constexpr int64_t tiles() const { return slices * depth; }
  constexpr int64_t line_tiles() const { return (slices - dealt) * depth; }

  // line_tiles() · run / line_runs, rounded down. Runs are at most kMostRuns, so 32 bits do for what
  // needs a division, which is slow with 64.
  constexpr int64_t line_begin(int run) const {
    if (run >= line_runs) return line_tiles();
    return run * run_tiles + static_cast<uint32_t>(run) * left / line_runs;
  }

  // All tiles of a run.
  constexpr int64_t tiles_of(int run) const {
    return dealt / runs * depth + line_begin(run + 1) - line_begin(run);
  }

  // The run that holds a tile of the line: the last one that begins at or before it.
  constexpr int run_of(int64_t tile) const {
    return static_cast<int>(quotient((tile + 1) * line_runs - 1, line_tiles()));
  }

  constexpr Sharing sharing(int run, int64_t slice) const {
    if (slice < dealt) return {1, 0};
    const int64_t head_tile = (slice - dealt) * depth;
    const int head = run_of(head_tile);
    return {run_of(head_tile + depth - 1) - head + 1, run - head};
  }

  constexpr bool operator==(const Partition&) const = default;

  // GPUs divide 64-bit numbers slowly, and hardly any line is that long.
  static constexpr int64_t quotient(int64_t a, int64_t b) {
    const bool fit = (static_cast<uint64_t>(a) | static_cast<uint64_t>(b)) >> 32 == 0;
    return fit ? static_cast<uint32_t>(a) / static_cast<uint32_t>(b) : a / b;
  }
};

// Walks over the segments of a run:  for (SegmentWalk walk(p, run); walk; walk.next()) *walk ...
class SegmentWalk {
 public:
  // `partition` must outlive the walk. It begins one step before the first slice, with nothing.
  constexpr SegmentWalk(const Partition& partition, int run)
      : partition_(partition), run_(run), segment_{run - partition.runs, 0, 0} {
    next();
  }

  constexpr explicit operator bool() const { return segment_.last > segment_.first; }
  constexpr const Segment& operator*() const { return segment_; }
  constexpr const Segment* operator->() const { return &segment_; }

  constexpr void next() {
    if (segment_.slice < partition_.dealt) {
      segment_ = {segment_.slice + partition_.runs, 0, partition_.depth};
      if (segment_.slice < partition_.dealt) return;
      const int64_t begin = partition_.line_begin(run_);
      left_ = static_cast<int>(partition_.line_begin(run_ + 1) - begin);
      const auto slice = static_cast<uint32_t>(begin) / static_cast<uint32_t>(partition_.depth);
      segment_.slice = static_cast<int>(partition_.dealt + slice);
      segment_.first = static_cast<int>(begin - int64_t{slice} * partition_.depth);
    } else {
      segment_.slice += 1;
      segment_.first = 0;
    }
    segment_.last = end_of(segment_.first);
    left_ -= segment_.last - segment_.first;
  }

 private:
  constexpr int end_of(int first) const {
    return left_ < partition_.depth - first ? first + left_ : partition_.depth;
  }

  const Partition& partition_;
  int run_;
  int left_ = 0;  // tiles of the line after this segment
  Segment segment_;
};

// Walks over the tiles of a run that belong to one of `groups` groups of warps, which take the
// tiles of every segment in turn.
class TileWalk {
 public:
  constexpr TileWalk(const Partition& partition, int run, int group, int groups)
      : segments_(partition, run), group_(group), groups_(groups) {
    tile_ = segments_->first + group_;
    skip_finished_segments();
  }

  constexpr explicit operator bool() const { return static_cast<bool>(segments_); }
  constexpr int64_t slice() const { return segments_->slice; }
  constexpr int tile() const { return tile_; }  // along k

  // Returns whether the next tile is in the same slice, `groups` further along k.
  constexpr bool next() {
    tile_ += groups_;
    if (tile_ < segments_->last) return true;
    skip_finished_segments();
    return false;
  }

 private:
  constexpr void skip_finished_segments() {
    while (segments_ && tile_ >= segments_->last) {
      segments_.next();
      tile_ = segments_->first + group_;
    }
  }

  SegmentWalk segments_;
  int group_;
  int groups_;
  int tile_ = 0;
};

}  // namespace marlin
