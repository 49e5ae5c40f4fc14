// Causal attention with a sink in bfloat16, by tiles, for processors whose vectors multiply it (AVX-512) and that
// have no matrix units (AMX).
//
// PyTorch's kernel multiplies unpacked matrices there, slower than in float32. The products of packed ones that it
// keeps for matrix units run at twice the speed of float32 in vectors too, in tiles that stay in the first cache.
// The algorithm is FlashAttention's (Dao, 2023): weights are rounded to bfloat16 for their products, everything
// else is float32. The sink takes part in a row's last sum, so no pass over the output is left for it.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/ceil_div.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <tuple>
#include <vector>

namespace stablemask {
namespace tiles {
namespace {

using at::BFloat16;
using lanes_t = at::vec::Vectorized<float>;

constexpr int64_t LANES = lanes_t::size();
constexpr int64_t LONGEST = 1 << 19; // numbers of a key head's queries whose gradients a thread keeps in float32

// Rows of a tile are made of words of 32 bits: numbers, or pairs of them.
template <typename scalar_t>
constexpr int64_t WORD = sizeof(float) / sizeof(scalar_t);

// Whether there is room for the gradients of a key head's queries.
bool has_room(const at::Tensor& query, const at::Tensor& key) {
  return query.numel() / (query.size(0) * key.size(1)) <= LONGEST;
}

// Whether the output can be computed so, at the speed of shorter ones.
bool fit(const at::Tensor& query, const at::Tensor& key) {
  return (query.scalar_type() == at::kFloat && query.size(3) % 16 == 0 && has_room(query, key)) ||
      (query.scalar_type() == at::kBFloat16 && query.size(3) % 32 == 0);
}

// A tile that is a contiguous copy of rows, zeros after them.
template <typename scalar_t>
void copy_rows(const scalar_t* from, int64_t stride, int64_t count, int64_t tile, int64_t dim, scalar_t* to) {
  for (int64_t row = 0; row < count; ++row) {
    std::copy_n(from + row * stride, dim, to + row * dim);
  }
  std::fill(to + count * dim, to + tile * dim, scalar_t(0));
}

// The right side of a product: of bfloat16 with its rows in pairs, [tile / 2][dim][2].
const BFloat16* pack(const BFloat16* from, int64_t tile, int64_t dim, BFloat16* to) {
  const auto* bits = reinterpret_cast<const uint16_t*>(from);
  auto* pairs = reinterpret_cast<uint32_t*>(to);
  for (int64_t row = 0; row < tile; row += 2) {
    const uint16_t *first = bits + row * dim, *second = first + dim;
    for (int64_t i = 0; i < dim; ++i) {
      pairs[row / 2 * dim + i] = static_cast<uint32_t>(second[i]) << 16 | first[i];
    }
  }
  return to;
}

const float* pack(const float* from, int64_t, int64_t, float*) {
  return from;
}

// ... of the transpose of (tile, dim): of bfloat16 [dim / 2][tile][2], for words are moved whole.
template <typename scalar_t>
const scalar_t* pack_transposed(const scalar_t* from, int64_t tile, int64_t dim, scalar_t* to) {
  const int64_t words = dim / WORD<scalar_t>;
  const auto* rows = reinterpret_cast<const float*>(from);
  auto* columns = reinterpret_cast<float*>(to);
  for (int64_t row = 0; row < tile; row += 16) {
    for (int64_t word = 0; word < words; word += 16) {
      at::vec::transpose_mxn<float, 16, 16>(rows + row * words + word, words, columns + word * tile + row, tile);
    }
  }
  return to;
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

// c (rows, columns) = a (rows, inner) b, or is added to; b is packed.
template <typename scalar_t>
void multiply(const scalar_t* a, const scalar_t* b, float* c, int64_t rows, int64_t columns, int64_t inner, bool add) {
  constexpr bool packed = WORD<scalar_t> > 1;
  at::native::cpublas::brgemm(rows, columns, inner, inner, columns, columns, add, a, b, c, packed);
}

// The left side of a product, of numbers that were computed.
const BFloat16* rounded(const float* from, int64_t count, BFloat16* to) {
  at::vec::convert(from, to, count);
  return to;
}

const float* rounded(const float* from, int64_t, float*) {
  return from;
}

// A tile's buffers, of one kind of numbers.
template <typename scalar_t, size_t count>
std::array<std::vector<scalar_t>, count> buffers(int64_t size) {
  std::array<std::vector<scalar_t>, count> all;
  all.fill(std::vector<scalar_t>(size));
  return all;
}

// What is known of the rows of a tile while its keys pass: the largest score so far, and the sum of the weights over it.
template <int64_t TILE>
struct Rows {
  float most[TILE], sum[TILE];

  Rows() {
    std::fill_n(most, TILE, -std::numeric_limits<float>::infinity());
    std::fill_n(sum, TILE, 0.0f);
  }

  // Scores become weights; `faded` is by what sums of earlier weights are to be multiplied.
  void add(float* scores, float scale, float* faded) {
    float before[TILE];
    std::copy_n(most, TILE, before);
    for (int64_t row = 0; row < TILE; ++row) {
      lanes_t largest(most[row]);
      for (int64_t i = 0; i < TILE; i += LANES) {
        const lanes_t scaled = lanes_t::loadu(scores + row * TILE + i) * lanes_t(scale);
        scaled.store(scores + row * TILE + i);
        largest = at::vec::maximum(largest, scaled);
      }
      most[row] = at::vec::vec_reduce_all<float>(
          [](lanes_t x, lanes_t y) { return at::vec::maximum(x, y); }, largest);
    }
    for (int64_t i = 0; i < TILE; i += LANES) {
      (lanes_t::loadu(before + i) - base(i)).exp().store(faded + i);
    }
    for (int64_t row = 0; row < TILE; ++row) {
      const float base = finite(most[row]);
      lanes_t total(0);
      for (int64_t i = 0; i < TILE; i += LANES) {
        const lanes_t weight = (lanes_t::loadu(scores + row * TILE + i) - lanes_t(base)).exp_u20();
        weight.store(scores + row * TILE + i);
        total = total + weight;
      }
      sum[row] = sum[row] * faded[row] + at::vec::vec_reduce_all<float>(std::plus<lanes_t>(), total);
    }
  }

  // With the sinks: by what sums of weights are to be multiplied in the end, and the logsumexp.
  void finish(const float* sinks, float* kept, float* lse) const {
    const lanes_t one(1);
    for (int64_t i = 0; i < TILE; i += LANES) {
      const auto highest = lanes_t::loadu(most + i), sink = lanes_t::loadu(sinks + i);
      const auto top = at::vec::maximum(highest, sink);
      // The larger of the two is 1, infinities too.
      const auto share = lanes_t::blendv((highest - top).exp(), one, highest >= sink);
      const auto taken = lanes_t::blendv((sink - top).exp(), one, sink >= highest);
      const auto total = lanes_t::loadu(sum + i) * share + taken;
      (share / total).store(kept + i);
      (top + total.log()).store(lse + i);
    }
  }

 private:
  static float finite(float number) {
    return number == -std::numeric_limits<float>::infinity() ? 0 : number;
  }

  lanes_t base(int64_t i) const {
    const auto highest = lanes_t::loadu(most + i);
    return lanes_t::blendv(highest, lanes_t(0), highest == lanes_t(-std::numeric_limits<float>::infinity()));
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

at::Tensor tokens_first(const at::Tensor& tensor) {
  return at::empty({tensor.size(0), tensor.size(2), tensor.size(1), tensor.size(3)}, tensor.options()).transpose(1, 2);
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

  at::parallel_for(0, query.size(0) * heads * blocks, 1, [&](int64_t begin, int64_t end) {
    auto [rows, tail, packed] = buffers<scalar_t, 3>(TILE * dim);
    std::vector<scalar_t> weights(TILE * TILE);
    std::vector<float> scores(TILE * TILE), sums(TILE * dim);
    float faded[TILE], taken[TILE], kept[TILE], totals[TILE];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / blocks / heads, h = i / blocks % heads, first = i % blocks * TILE;
      const int64_t count = std::min(TILE, length - first);
      copy_rows(rows_of<scalar_t>(query, b, h, first), query.stride(2), count, TILE, dim, rows.data());
      Rows<TILE> known;
      for (int64_t start = 0; start <= first; start += TILE) {
        const int64_t keys = std::min(TILE, length - start);
        copy_rows(rows_of<scalar_t>(key, b, h / groups, start), key.stride(2), keys, TILE, dim, tail.data());
        const scalar_t* columns = pack_transposed(tail.data(), TILE, dim, packed.data());
        multiply<scalar_t>(rows.data(), columns, scores.data(), TILE, TILE, dim, false);
        if (start == first) {
          for (int64_t row = 0; row < TILE; ++row) {
            std::fill(scores.data() + row * TILE + row + 1, scores.data() + (row + 1) * TILE,
                      -std::numeric_limits<float>::infinity());
          }
        }
        known.add(scores.data(), static_cast<float>(scale), faded);
        for (int64_t row = 0; start > 0 && row < TILE; ++row) {
          if (faded[row] != 1) {
            const lanes_t factor(faded[row]);
            for (int64_t column = 0; column < dim; column += LANES) {
              float* at = sums.data() + row * dim + column;
              (lanes_t::loadu(at) * factor).store(at);
            }
          }
        }
        copy_rows(rows_of<scalar_t>(value, b, h / groups, start), value.stride(2), keys, TILE, dim, tail.data());
        multiply<scalar_t>(rounded(scores.data(), TILE * TILE, weights.data()), pack(tail.data(), TILE, dim, packed.data()),
                           sums.data(), TILE, dim, TILE, start > 0);
      }
      const float* sink_from = sinks + b * sink.stride(0) + h * sink.stride(1) + first * sink.stride(2);
      for (int64_t row = 0; row < TILE; ++row) {
        taken[row] = row < count ? sink_from[row * sink.stride(2)] : 0;
      }
      known.finish(taken, kept, totals);
      std::copy_n(totals, count, lses + (b * heads + h) * length + first);
      scalar_t* to = mutable_rows_of<scalar_t>(out, b, h, first);
      for (int64_t row = 0; row < count; ++row) {
        float* from = sums.data() + row * dim;
        const lanes_t factor(kept[row]);
        at::vec::map<float>([factor](lanes_t x) { return x * factor; }, from, from, dim);
        at::vec::convert(from, to + row * out.stride(2), dim);
      }
    }
    at::native::cpublas::brgemm_release();
  });
  return {out, lse};
}

// Gradients of query, key and value; lse is contiguous, grad's last axis too.
template <typename scalar_t, int64_t TILE>
std::tuple<at::Tensor, at::Tensor, at::Tensor> differentiate_in(const at::Tensor& grad, const at::Tensor& query,
                                                             const at::Tensor& key, const at::Tensor& value,
                                                             const at::Tensor& out, const at::Tensor& lse, double scale) {
  const int64_t heads = query.size(1), length = query.size(2), dim = query.size(3);
  const int64_t key_heads = key.size(1), groups = heads / key_heads, blocks = at::ceil_div(length, TILE);
  at::Tensor d_query = tokens_first(query), d_key = tokens_first(key), d_value = tokens_first(value);
  const float* lses = lse.const_data_ptr<float>();

  at::parallel_for(0, query.size(0) * key_heads, 1, [&](int64_t begin, int64_t end) {
    auto [keys, values, transposed, rows, grads] = buffers<scalar_t, 5>(TILE * dim);
    std::vector<scalar_t> packed(TILE * std::max(dim, TILE)), weights(TILE * TILE);
    auto [scores, d_weights] = buffers<float, 2>(TILE * TILE);
    auto [key_sums, value_sums] = buffers<float, 2>(TILE * dim);
    // By query head and block: a transposed tile of its gradient, and by row lse and rowsum(grad * out).
    std::vector<float> query_sums(groups * blocks * TILE * dim);
    std::vector<float> totals(groups * blocks * TILE), dots(groups * blocks * TILE);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / key_heads, key_head = i % key_heads;
      for (int64_t row = 0; row < groups * blocks * TILE; ++row) {
        const int64_t h = key_head * groups + row / (blocks * TILE), place = row % (blocks * TILE);
        const bool is_row = place < length;
        // Past the end every weight is 0.
        totals[row] = is_row ? lses[(b * heads + h) * length + place] : std::numeric_limits<float>::infinity();
        dots[row] = !is_row ? 0 : at::vec::map2_reduce_all<scalar_t>(
            [](lanes_t x, lanes_t y) { return x * y; }, [](lanes_t x, lanes_t y) { return x + y; },
            rows_of<scalar_t>(grad, b, h, place), rows_of<scalar_t>(out, b, h, place), dim);
      }
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t start = block * TILE, count = std::min(TILE, length - start);
        copy_rows(rows_of<scalar_t>(key, b, key_head, start), key.stride(2), count, TILE, dim, keys.data());
        copy_rows(rows_of<scalar_t>(value, b, key_head, start), value.stride(2), count, TILE, dim, values.data());
        transpose(keys.data(), TILE, dim, packed.data(), transposed.data());
        bool begun = false;
        for (int64_t g = 0; g < groups; ++g) {
          for (int64_t other = block; other < blocks; ++other) {
            const int64_t h = key_head * groups + g, first = other * TILE, some = std::min(TILE, length - first);
            const int64_t place = (g * blocks + other) * TILE;
            copy_rows(rows_of<scalar_t>(query, b, h, first), query.stride(2), some, TILE, dim, rows.data());
            copy_rows(rows_of<scalar_t>(grad, b, h, first), grad.stride(2), some, TILE, dim, grads.data());
            // Keys by rows, for then what is known of a row is a lane.
            multiply<scalar_t>(keys.data(), pack_transposed(rows.data(), TILE, dim, packed.data()), scores.data(), TILE, TILE,
                               dim, false);
            multiply<scalar_t>(values.data(), pack_transposed(grads.data(), TILE, dim, packed.data()), d_weights.data(), TILE,
                               TILE, dim, false);
            for (int64_t row = 0; row < TILE; row += LANES) {
              const auto total = lanes_t::loadu(totals.data() + place + row);
              const auto dot = lanes_t::loadu(dots.data() + place + row);
              const auto lane = lanes_t::arange<float>(static_cast<float>(row), 1);
              for (int64_t k = 0; k < TILE; ++k) {
                float *score = scores.data() + k * TILE + row, *d_weight = d_weights.data() + k * TILE + row;
                auto weight = (lanes_t::loadu(score) * lanes_t(static_cast<float>(scale)) - total).exp_u20();
                if (other == block) {
                  weight = lanes_t::blendv(lanes_t(0), weight, lane >= lanes_t(static_cast<float>(k)));
                }
                weight.store(score);
                (weight * (lanes_t::loadu(d_weight) - dot) * lanes_t(static_cast<float>(scale))).store(d_weight);
              }
            }
            multiply<scalar_t>(rounded(scores.data(), TILE * TILE, weights.data()),
                               pack(grads.data(), TILE, dim, packed.data()), value_sums.data(), TILE, dim, TILE, begun);
            const scalar_t* d_scores = rounded(d_weights.data(), TILE * TILE, weights.data());
            multiply<scalar_t>(d_scores, pack(rows.data(), TILE, dim, packed.data()), key_sums.data(), TILE, dim, TILE, begun);
            multiply<scalar_t>(transposed.data(), pack(d_scores, TILE, TILE, packed.data()), query_sums.data() + place * dim,
                               dim, TILE, TILE, block > 0);
            begun = true;
          }
        }
        for (int64_t row = 0; row < count; ++row) {
          at::vec::convert(key_sums.data() + row * dim, mutable_rows_of<scalar_t>(d_key, b, key_head, start + row), dim);
          at::vec::convert(value_sums.data() + row * dim, mutable_rows_of<scalar_t>(d_value, b, key_head, start + row), dim);
        }
      }
      for (int64_t tile = 0; tile < groups * blocks; ++tile) {
        const int64_t h = key_head * groups + tile / blocks, first = tile % blocks * TILE;
        float* sums = key_sums.data();
        for (int64_t row = 0; row < TILE; row += 16) {
          for (int64_t column = 0; column < dim; column += 16) {
            at::vec::transpose_mxn<float, 16, 16>(
                query_sums.data() + (tile * dim + column) * TILE + row, TILE, sums + row * dim + column, dim);
          }
        }
        for (int64_t row = 0; row < std::min(TILE, length - first); ++row) {
          at::vec::convert(sums + row * dim, mutable_rows_of<scalar_t>(d_query, b, h, first + row), dim);
        }
      }
    }
    at::native::cpublas::brgemm_release();
  });
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
