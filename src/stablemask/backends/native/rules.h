// Where a way of ours is faster than PyTorch's kernel on this processor, as tuning.py has timed it.

#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>
#include <vector>

namespace stablemask {
namespace {

enum Way : size_t { FORWARD_BY_TILES, BACKWARD_BY_TILES, BACKWARD_IN_FLOAT32 };

using Interval = std::pair<int64_t, int64_t>; // rows: the first and the last

// Of each way, for float32, bfloat16 and half.
using Rules = std::array<std::array<std::vector<Interval>, 3>, 3>;

Rules rules; // set when the library is loaded; nothing is faster where nothing was timed

bool is_faster(Way way, const at::Tensor& query, int64_t length) {
  const auto dtype = query.scalar_type();
  if (dtype == at::kDouble) {
    return false;
  }
  const auto& intervals = rules[way][dtype == at::kFloat ? 0 : dtype == at::kBFloat16 ? 1 : 2];
  return std::any_of(intervals.begin(), intervals.end(), [length](const Interval& interval) {
    return interval.first <= length && length <= interval.second;
  });
}

} // namespace
} // namespace stablemask
