// Causal attention with a sink by tiles, in float32 and bfloat16, forward and backward, for processors with AVX-512.
//
// The products of PyTorch's kernel reach half of such a processor's speed in float32, and in bfloat16 less than that:
// they are of unpacked matrices, where there are no matrix units (AMX). oneDNN's products of small tiles, which PyTorch
// exports, run at its full speed, twice that in bfloat16, and a tile stays in the first cache from one to the next.
// The algorithm is FlashAttention's (Dao, 2023): weights and their gradients are rounded to bfloat16 for their products,
// everything else is float32. The sink takes part in a row's last sum, so no pass over the output is left for it.

#pragma once

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/ceil_div.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <exception>
#include <limits>
#include <tuple>

namespace stablemask {
namespace tiles {
namespace {

using at::BFloat16;
using lanes_t = at::vec::Vectorized<float>;

constexpr int64_t LANES = lanes_t::size();
constexpr int64_t SQUARE = 16; // rows and columns that are transposed at once
static_assert(SQUARE % LANES == 0);
constexpr int64_t LONGEST = 1 << 21; // numbers of a head's queries whose gradients a thread keeps, 8 MiB

// Rows of a tile are made of words of 32 bits: numbers, or pairs of them.
template <typename scalar_t>
constexpr int64_t WORD = sizeof(float) / sizeof(scalar_t);

// Whether there is room for the gradients of a head's queries.
bool has_room(const at::Tensor& query) {
  return query.size(2) * query.size(3) <= LONGEST;
}

// A tile that is a contiguous copy of rows, zeros after them.
template <typename scalar_t>
void copy_rows(const scalar_t* from, int64_t stride, int64_t count, int64_t tile, int64_t dim, scalar_t* to) {
  for (int64_t row = 0; row < count; ++row) {
    std::copy_n(from + row * stride, dim, to + row * dim);
  }
  std::fill(to + count * dim, to + tile * dim, scalar_t(0));
}

// The right side of a product, its rows `stride` apart: of bfloat16 in pairs, [tile / 2][dim][2].
const BFloat16* pack(const BFloat16* from, int64_t stride, int64_t tile, int64_t dim, BFloat16* to) {
  const auto* bits = reinterpret_cast<const uint16_t*>(from);
  auto* pairs = reinterpret_cast<uint32_t*>(to);
  for (int64_t row = 0; row < tile; row += 2) {
    const uint16_t *first = bits + row * stride, *second = first + stride;
    for (int64_t i = 0; i < dim; ++i) {
      pairs[row / 2 * dim + i] = static_cast<uint32_t>(second[i]) << 16 | first[i];
    }
  }
  return to;
}

const BFloat16* pack(const BFloat16* from, int64_t tile, int64_t dim, BFloat16* to) {
  return pack(from, dim, tile, dim, to);
}

const float* pack(const float* from, int64_t, int64_t, float*) {
  return from;
}

// (rows, columns), multiples of SQUARE, to (columns, rows); rows are `stride` apart.
void transpose_words(const float* from, int64_t stride, int64_t rows, int64_t columns, float* to) {
  for (int64_t row = 0; row < rows; row += SQUARE) {
    for (int64_t column = 0; column < columns; column += SQUARE) {
      at::vec::transpose_mxn<float, SQUARE, SQUARE>(from + row * stride + column, stride, to + column * rows + row, rows);
    }
  }
}

// ... of the transpose of (tile, dim): of bfloat16 [dim / 2][tile][2], for words are moved whole.
template <typename scalar_t>
const scalar_t* pack_transposed(const scalar_t* from, int64_t stride, int64_t tile, int64_t dim, scalar_t* to) {
  transpose_words(reinterpret_cast<const float*>(from), stride / WORD<scalar_t>, tile, dim / WORD<scalar_t>,
                  reinterpret_cast<float*>(to));
  return to;
}

template <typename scalar_t>
const scalar_t* pack_transposed(const scalar_t* from, int64_t tile, int64_t dim, scalar_t* to) {
  return pack_transposed(from, dim, tile, dim, to);
}

// The transpose of (tile, dim) as it is; `work` is as large.
const BFloat16* transpose(const BFloat16* from, int64_t tile, int64_t dim, BFloat16* work, BFloat16* to) {
  const auto* pairs = reinterpret_cast<const uint32_t*>(pack_transposed(from, tile, dim, work));
  auto* bits = reinterpret_cast<uint16_t*>(to);
  for (int64_t i = 0; i < dim; i += 2) {
    for (int64_t row = 0; row < tile; ++row) {
      const uint32_t pair = pairs[i / 2 * tile + row];
      bits[i * tile + row] = static_cast<uint16_t>(pair);
      bits[(i + 1) * tile + row] = static_cast<uint16_t>(pair >> 16);
    }
  }
  return to;
}

const float* transpose(const float* from, int64_t tile, int64_t dim, float*, float* to) {
  return pack_transposed(from, tile, dim, to);
}

// c (rows, columns) = a (rows, inner) b, or is added to; b is packed, its rows `b_stride` apart.
template <typename scalar_t>
void multiply(const scalar_t* a, const scalar_t* b, int64_t b_stride, float* c, int64_t rows, int64_t columns,
              int64_t inner, bool add) {
  constexpr bool packed = WORD<scalar_t> > 1;
  at::native::cpublas::brgemm(rows, columns, inner, inner, b_stride, columns, add, a, b, c, packed);
}

template <typename scalar_t>
void multiply(const scalar_t* a, const scalar_t* b, float* c, int64_t rows, int64_t columns, int64_t inner, bool add) {
  multiply(a, b, columns, c, rows, columns, inner, add);
}

// Whether products are what they should be. Where oneDNN is held to an older processor (ONEDNN_MAX_CPU_ISA),
// PyTorch refuses packed matrices, or takes them for unpacked ones.
template <typename scalar_t>
bool is_right() {
  constexpr int64_t size = 32;
  std::array<scalar_t, size * size> a, b, work;
  std::array<float, size * size> c;
  for (int64_t i = 0; i < size * size; ++i) {
    a[i] = static_cast<scalar_t>(static_cast<float>(i % 7 - 3));
    b[i] = static_cast<scalar_t>(static_cast<float>(i % 5 - 2));
  }
  try {
    multiply<scalar_t>(a.data(), pack(b.data(), size, size, work.data()), c.data(), size, size, size, /*add=*/false);
    at::native::cpublas::brgemm_release();
  } catch (const std::exception&) { // PyTorch's or oneDNN's own
    return false;
  }
  for (int64_t i = 0; i < size * size; ++i) {
    float sum = 0;
    for (int64_t k = 0; k < size; ++k) {
      sum += static_cast<float>(a[i / size * size + k]) * static_cast<float>(b[k * size + i % size]);
    }
    if (c[i] != sum) { // small integers: exact
      return false;
    }
  }
  return true;
}

// Whether heads of a dtype and head_dim can be computed so.
bool serve(at::ScalarType dtype, int64_t dim) {
  if (!at::globalContext().userEnabledMkldnn()) {
    return false;
  }
  if (dtype == at::kFloat && dim % SQUARE == 0) {
    static const bool right = is_right<float>();
    return right;
  }
  if (dtype == at::kBFloat16 && dim % (SQUARE * WORD<BFloat16>) == 0) {
    static const bool right = is_right<BFloat16>();
    return right;
  }
  return false;
}

// The left side of a product, of numbers that were computed.
const BFloat16* rounded(const float* from, int64_t count, BFloat16* to) {
  at::vec::convert(from, to, count);
  return to;
}

const float* rounded(const float* from, int64_t, float*) {
  return from;
}

// Memory for each thread, taken once, aligned to lines of the cache, and cut into what a thread needs.
class Buffers {
 public:
  explicit Buffers(int64_t bytes) : size_(bytes), memory_(at::empty({at::get_num_threads(), bytes}, at::kByte)) {}

  // Of the calling thread.
  class Cut {
   public:
    explicit Cut(char* at) : at_(at) {}

    template <typename scalar_t>
    scalar_t* take(int64_t count) {
      auto* taken = reinterpret_cast<scalar_t*>(at_);
      at_ += count * sizeof(scalar_t);
      return taken;
    }

   private:
    char* at_;
  };

  Cut cut() {
    return Cut(static_cast<char*>(memory_.mutable_data_ptr()) + at::get_thread_num() * size_);
  }

 private:
  int64_t size_;
  at::Tensor memory_;
};

// What is known of the rows of a tile while its keys pass: a base that no score exceeds by more than SLACK, and the
// sum of the weights over it. So seldom has what was summed to be multiplied, when a score is larger than all before.
template <int64_t TILE>
struct Rows {
  static constexpr float SLACK = 8; // e^8 is far from where float32 ends

  float base[TILE], sum[TILE];

  Rows() {
    std::fill_n(base, TILE, -std::numeric_limits<float>::infinity());
    std::fill_n(sum, TILE, 0.0f);
  }

  // Scores become weights, of `rows` that are `columns` apart, a multiple of LANES; `faded` is by what sums of earlier
  // weights are to be multiplied.
  void add(float* scores, float scale, float* faded, int64_t rows = TILE, int64_t columns = TILE) {
    for (int64_t row = 0; row < rows; ++row) {
      float* of_row = scores + row * columns;
      lanes_t largest(-std::numeric_limits<float>::infinity());
      for (int64_t i = 0; i < columns; i += LANES) {
        const lanes_t scaled = lanes_t::loadu(of_row + i) * lanes_t(scale);
        scaled.store(of_row + i);
        largest = at::vec::maximum(largest, scaled);
      }
      const float most = at::vec::vec_reduce_all<float>(
          [](lanes_t x, lanes_t y) { return at::vec::maximum(x, y); }, largest);
      faded[row] = 1;
      if (most > base[row] + SLACK) {
        faded[row] = std::exp(base[row] - most);
        base[row] = most;
      }
      const lanes_t shift(base[row] == -std::numeric_limits<float>::infinity() ? 0 : base[row]);
      lanes_t total(0);
      for (int64_t i = 0; i < columns; i += LANES) {
        const lanes_t weight = (lanes_t::loadu(of_row + i) - shift).exp_u20();
        weight.store(of_row + i);
        total = total + weight;
      }
      sum[row] = sum[row] * faded[row] + at::vec::vec_reduce_all<float>(std::plus<lanes_t>(), total);
    }
  }

  // With the sinks: by what sums of weights are to be multiplied in the end, and the logsumexp.
  void finish(const float* sinks, float* kept, float* lse) const {
    const lanes_t one(1);
    for (int64_t i = 0; i < TILE; i += LANES) {
      const auto highest = lanes_t::loadu(base + i), sink = lanes_t::loadu(sinks + i);
      const auto top = at::vec::maximum(highest, sink);
      // The larger of the two is 1, infinities too.
      const auto share = lanes_t::blendv((highest - top).exp(), one, highest >= sink);
      const auto taken = lanes_t::blendv((sink - top).exp(), one, sink >= highest);
      const auto total = lanes_t::loadu(sum + i) * share + taken;
      (share / total).store(kept + i);
      (top + total.log()).store(lse + i);
    }
  }
};

template <typename scalar_t>
const scalar_t* rows_of(const at::Tensor& tensor, int64_t b, int64_t h, int64_t first) {
  return tensor.const_data_ptr<scalar_t>() + b * tensor.stride(0) + h * tensor.stride(1) + first * tensor.stride(2);
}

template <typename scalar_t>
scalar_t* mutable_rows_of(const at::Tensor& tensor, int64_t b, int64_t h, int64_t first) {
  return tensor.mutable_data_ptr<scalar_t>() + b * tensor.stride(0) + h * tensor.stride(1) + first * tensor.stride(2);
}

template <typename scalar_t>
void write_rows(const float* from, int64_t count, int64_t dim, scalar_t* to, int64_t stride) {
  for (int64_t row = 0; row < count; ++row) {
    at::vec::convert(from + row * dim, to + row * stride, dim);
  }
}

at::Tensor tokens_first(const at::Tensor& tensor) {
  return at::empty({tensor.size(0), tensor.size(2), tensor.size(1), tensor.size(3)}, tensor.options()).transpose(1, 2);
}

// Of the square on the diagonal, what lies above it.
template <int64_t TILE>
void hide_later_keys(float* scores) {
  for (int64_t row = 0; row < TILE; ++row) {
    std::fill(scores + row * TILE + row + 1, scores + (row + 1) * TILE, -std::numeric_limits<float>::infinity());
  }
}

template <int64_t TILE>
void scale_rows(float* sums, const float* factors, int64_t dim, int64_t rows = TILE) {
  for (int64_t row = 0; row < rows; ++row) {
    if (factors[row] != 1) {
      const lanes_t factor(factors[row]);
      float* at = sums + row * dim;
      at::vec::map<float>([factor](lanes_t x) { return x * factor; }, at, at, dim);
    }
  }
}

// Out (B, H, n, D) and lse (B, H, n) with the sink in it, which is of float32 and broadcast to (B, H, n).
template <typename scalar_t, int64_t TILE>
std::tuple<at::Tensor, at::Tensor> attend_in(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                          const at::Tensor& sink, double scale) {
  const int64_t heads = query.size(1), length = query.size(2), dim = query.size(3), groups = heads / key.size(1);
  const int64_t blocks = at::ceil_div(length, TILE);
  at::Tensor out = tokens_first(query), lse = at::empty(sink.sizes(), sink.options());
  float* lses = lse.mutable_data_ptr<float>();
  const float* sinks = sink.const_data_ptr<float>();
  Buffers buffers(TILE * (sizeof(scalar_t) * (3 * dim + TILE) + sizeof(float) * (dim + TILE)));

  at::parallel_for(0, query.size(0) * heads * blocks, 1, [&](int64_t begin, int64_t end) {
    auto memory = buffers.cut();
    auto *rows = memory.template take<scalar_t>(TILE * dim), *tile = memory.template take<scalar_t>(TILE * dim);
    auto *packed = memory.template take<scalar_t>(TILE * dim), *weights = memory.template take<scalar_t>(TILE * TILE);
    auto *scores = memory.template take<float>(TILE * TILE), *sums = memory.template take<float>(TILE * dim);
    float faded[TILE], taken[TILE], kept[TILE], totals[TILE];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / blocks / heads, h = i / blocks % heads, first = i % blocks * TILE;
      const int64_t count = std::min(TILE, length - first);
      copy_rows(rows_of<scalar_t>(query, b, h, first), query.stride(2), count, TILE, dim, rows);
      Rows<TILE> known;
      for (int64_t start = 0; start <= first; start += TILE) {
        const int64_t keys = std::min(TILE, length - start);
        copy_rows(rows_of<scalar_t>(key, b, h / groups, start), key.stride(2), keys, TILE, dim, tile);
        const scalar_t* columns = pack_transposed(tile, TILE, dim, packed);
        multiply<scalar_t>(rows, columns, scores, TILE, TILE, dim, false);
        if (start == first) {
          hide_later_keys<TILE>(scores);
        }
        known.add(scores, static_cast<float>(scale), faded);
        if (start > 0) {
          scale_rows<TILE>(sums, faded, dim);
        }
        copy_rows(rows_of<scalar_t>(value, b, h / groups, start), value.stride(2), keys, TILE, dim, tile);
        multiply<scalar_t>(rounded(scores, TILE * TILE, weights), pack(tile, TILE, dim, packed),
                           sums, TILE, dim, TILE, start > 0);
      }
      const float* sink_from = sinks + b * sink.stride(0) + h * sink.stride(1) + first * sink.stride(2);
      for (int64_t row = 0; row < TILE; ++row) {
        taken[row] = row < count ? sink_from[row * sink.stride(2)] : 0;
      }
      known.finish(taken, kept, totals);
      std::copy_n(totals, count, lses + (b * heads + h) * length + first);
      scale_rows<TILE>(sums, kept, dim);
      write_rows(sums, count, dim, mutable_rows_of<scalar_t>(out, b, h, first), out.stride(2));
    }
    at::native::cpublas::brgemm_release();
  });
  return {out, lse};
}

// Scores, (keys, rows), become weights, and gradients of weights those of scores.
template <int64_t TILE>
void differentiate_scores(float* scores, float* d_weights, const float* totals, const float* dots, float scale,
                          bool on_diagonal) {
  for (int64_t row = 0; row < TILE; row += LANES) {
    const auto total = lanes_t::loadu(totals + row), dot = lanes_t::loadu(dots + row);
    const auto lane = lanes_t::arange<float>(static_cast<float>(row), 1);
    for (int64_t key = 0; key < TILE; ++key) {
      float *score = scores + key * TILE + row, *d_weight = d_weights + key * TILE + row;
      auto weight = (lanes_t::loadu(score) * lanes_t(scale) - total).exp_u20();
      if (on_diagonal) {
        weight = lanes_t::blendv(lanes_t(0), weight, lane >= lanes_t(static_cast<float>(key)));
      }
      weight.store(score);
      (weight * (lanes_t::loadu(d_weight) - dot) * lanes_t(scale)).store(d_weight);
    }
  }
}

// Rows of a head's share in the gradient of keys or values: in its place, or in float32 where heads share the keys.
template <typename scalar_t>
void write_part(const float* from, int64_t count, int64_t dim, int64_t b, int64_t h, int64_t first,
                const at::Tensor& whole, const at::Tensor& parts) {
  if (parts.is_same(whole)) {
    write_rows(from, count, dim, mutable_rows_of<scalar_t>(whole, b, h, first), whole.stride(2));
  } else {
    write_rows(from, count, dim, mutable_rows_of<float>(parts, b, h, first), parts.stride(2));
  }
}

// Whole (B, key heads, n, D) of parts (B, H, n, D), which is contiguous and of float32.
template <typename scalar_t>
void sum_parts(const at::Tensor& parts, const at::Tensor& whole) {
  const int64_t key_heads = whole.size(1), length = whole.size(2), dim = whole.size(3);
  const int64_t groups = parts.size(1) / key_heads;
  at::parallel_for(0, whole.size(0) * key_heads * length, at::ceil_div(at::internal::GRAIN_SIZE, groups * dim),
                   [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / length / key_heads, key_head = i / length % key_heads, row = i % length;
      float* sum = mutable_rows_of<float>(parts, b, key_head * groups, row);
      for (int64_t g = 1; g < groups; ++g) {
        at::vec::map2<float>([](lanes_t x, lanes_t y) { return x + y; }, sum, sum, sum + g * length * dim, dim);
      }
      at::vec::convert(sum, mutable_rows_of<scalar_t>(whole, b, key_head, row), dim);
    }
  });
}

// Gradients of query, key and value; lse is contiguous, grad's last axis too.
template <typename scalar_t, int64_t TILE>
std::tuple<at::Tensor, at::Tensor, at::Tensor> differentiate_in(const at::Tensor& grad, const at::Tensor& query,
                                                             const at::Tensor& key, const at::Tensor& value,
                                                             const at::Tensor& out, const at::Tensor& lse, double scale) {
  const int64_t heads = query.size(1), length = query.size(2), dim = query.size(3);
  const int64_t groups = heads / key.size(1), blocks = at::ceil_div(length, TILE);
  at::Tensor d_query = tokens_first(query), d_key = tokens_first(key), d_value = tokens_first(value);
  // Of each query head, where several share a key head: a thread has a query head, and sums are taken in one order.
  const at::TensorOptions in_float32 = query.options().dtype(at::kFloat);
  const at::Tensor key_parts = groups == 1 ? d_key : at::empty({query.size(0), heads, length, dim}, in_float32);
  const at::Tensor value_parts = groups == 1 ? d_value : at::empty_like(key_parts);
  const float* lses = lse.const_data_ptr<float>();
  const int64_t all_rows = blocks * TILE;
  Buffers buffers(TILE * sizeof(scalar_t) * (5 * dim + TILE + std::max(dim, TILE)) +
                  sizeof(float) * (2 * TILE * (TILE + dim) + all_rows * (dim + 2)));

  at::parallel_for(0, query.size(0) * heads, 1, [&](int64_t begin, int64_t end) {
    auto memory = buffers.cut();
    auto *keys = memory.template take<scalar_t>(TILE * dim), *values = memory.template take<scalar_t>(TILE * dim);
    auto *transposed = memory.template take<scalar_t>(TILE * dim), *rows = memory.template take<scalar_t>(TILE * dim);
    auto *grads = memory.template take<scalar_t>(TILE * dim), *weights = memory.template take<scalar_t>(TILE * TILE);
    auto* packed = memory.template take<scalar_t>(TILE * std::max(dim, TILE));
    auto *scores = memory.template take<float>(TILE * TILE), *d_weights = memory.template take<float>(TILE * TILE);
    auto *key_sums = memory.template take<float>(TILE * dim), *value_sums = memory.template take<float>(TILE * dim);
    // By block: a transposed tile of the query's gradient, and by row lse and rowsum(grad * out).
    auto* query_sums = memory.template take<float>(all_rows * dim);
    auto *totals = memory.template take<float>(all_rows), *dots = memory.template take<float>(all_rows);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / heads, h = i % heads, key_head = h / groups;
      for (int64_t row = 0; row < all_rows; ++row) {
        const bool is_row = row < length;
        // Past the end every weight is 0.
        totals[row] = is_row ? lses[i * length + row] : std::numeric_limits<float>::infinity();
        dots[row] = !is_row ? 0 : at::vec::map2_reduce_all<scalar_t>(
            [](lanes_t x, lanes_t y) { return x * y; }, [](lanes_t x, lanes_t y) { return x + y; },
            rows_of<scalar_t>(grad, b, h, row), rows_of<scalar_t>(out, b, h, row), dim);
      }
      for (int64_t start = 0; start < length; start += TILE) {
        const int64_t count = std::min(TILE, length - start);
        copy_rows(rows_of<scalar_t>(key, b, key_head, start), key.stride(2), count, TILE, dim, keys);
        copy_rows(rows_of<scalar_t>(value, b, key_head, start), value.stride(2), count, TILE, dim, values);
        transpose(keys, TILE, dim, packed, transposed);
        for (int64_t first = start; first < length; first += TILE) {
          const int64_t rows_left = std::min(TILE, length - first);
          const bool on_diagonal = first == start;
          copy_rows(rows_of<scalar_t>(query, b, h, first), query.stride(2), rows_left, TILE, dim, rows);
          copy_rows(rows_of<scalar_t>(grad, b, h, first), grad.stride(2), rows_left, TILE, dim, grads);
          // Keys by rows, for then what is known of a row is a lane.
          multiply<scalar_t>(keys, pack_transposed(rows, TILE, dim, packed), scores, TILE, TILE, dim, false);
          multiply<scalar_t>(values, pack_transposed(grads, TILE, dim, packed), d_weights, TILE, TILE, dim, false);
          differentiate_scores<TILE>(scores, d_weights, totals + first, dots + first, static_cast<float>(scale),
                                     on_diagonal);
          multiply<scalar_t>(rounded(scores, TILE * TILE, weights), pack(grads, TILE, dim, packed), value_sums, TILE,
                             dim, TILE, !on_diagonal);
          const scalar_t* d_scores = rounded(d_weights, TILE * TILE, weights);
          multiply<scalar_t>(d_scores, pack(rows, TILE, dim, packed), key_sums, TILE, dim, TILE, !on_diagonal);
          multiply<scalar_t>(transposed, pack(d_scores, TILE, TILE, packed), query_sums + first * dim, dim, TILE, TILE,
                             start > 0);
        }
        write_part<scalar_t>(key_sums, count, dim, b, h, start, d_key, key_parts);
        write_part<scalar_t>(value_sums, count, dim, b, h, start, d_value, value_parts);
      }
      for (int64_t first = 0; first < length; first += TILE) {
        transpose_words(query_sums + first * dim, TILE, dim, TILE, key_sums);
        write_rows(key_sums, std::min(TILE, length - first), dim, mutable_rows_of<scalar_t>(d_query, b, h, first),
                   d_query.stride(2));
      }
    }
    at::native::cpublas::brgemm_release();
  });
  if (groups > 1) {
    sum_parts<scalar_t>(key_parts, d_key);
    sum_parts<scalar_t>(value_parts, d_value);
  }
  return {d_query, d_key, d_value};
}

// The size of tiles, for which the square below the diagonal is computed soonest: small ones leave less of it out,
// but take longer for what is in it.
int64_t tile_of(int64_t length) {
  const auto numbers = [length](int64_t tile) {
    const int64_t blocks = at::ceil_div(length, tile);
    return blocks * (blocks + 1) / 2 * tile * tile;
  };
  return numbers(64) <= 1.4 * numbers(32) ? 64 : 32;
}

std::tuple<at::Tensor, at::Tensor> attend(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                          const at::Tensor& sink, double scale) {
  const bool small = tile_of(query.size(2)) == 32;
  const auto by = query.scalar_type() == at::kFloat ? (small ? attend_in<float, 32> : attend_in<float, 64>)
                                                    : (small ? attend_in<BFloat16, 32> : attend_in<BFloat16, 64>);
  return by(query, key, value, sink, scale);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> differentiate(const at::Tensor& grad, const at::Tensor& query,
                                                             const at::Tensor& key, const at::Tensor& value,
                                                             const at::Tensor& out, const at::Tensor& lse, double scale) {
  const bool small = tile_of(query.size(2)) == 32;
  const auto by = query.scalar_type() == at::kFloat
      ? (small ? differentiate_in<float, 32> : differentiate_in<float, 64>)
      : (small ? differentiate_in<BFloat16, 32> : differentiate_in<BFloat16, 64>);
  return by(grad, query, key, value, out, lse, scale);
}

} // namespace
} // namespace tiles
} // namespace stablemask
