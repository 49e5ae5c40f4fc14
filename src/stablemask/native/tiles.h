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

constexpr int64_t TILE = 64; // rows, and keys
constexpr int64_t LANES = lanes_t::size();
constexpr int64_t LONGEST = 1 << 19; // numbers of a key head's queries whose gradients a thread keeps in float32

// Whether head_dim can be packed.
bool fit(int64_t head_dim) {
  return head_dim % 32 == 0;
}

// A contiguous copy of the first rows of a tile, zeros after them.
void copy_rows(const BFloat16* from, int64_t stride, int64_t count, int64_t dim, BFloat16* to) {
  for (int64_t row = 0; row < count; ++row) {
    std::copy_n(from + row * stride, dim, to + row * dim);
  }
  std::fill(to + count * dim, to + TILE * dim, BFloat16(0));
}

// The right side of a product has its rows in pairs: of (TILE, dim), [TILE / 2][dim][2].
void pack(const BFloat16* from, int64_t dim, BFloat16* to) {
  const auto* bits = reinterpret_cast<const uint16_t*>(from);
  auto* pairs = reinterpret_cast<uint32_t*>(to);
  for (int64_t row = 0; row < TILE; row += 2) {
    const uint16_t *first = bits + row * dim, *second = first + dim;
    for (int64_t i = 0; i < dim; ++i) {
      pairs[row / 2 * dim + i] = static_cast<uint32_t>(second[i]) << 16 | first[i];
    }
  }
}

// ... and of the transpose of (TILE, dim), [dim / 2][TILE][2]: pairs are moved as what they are, 32 bits.
void pack_transposed(const BFloat16* from, int64_t dim, BFloat16* to) {
  const auto* pairs = reinterpret_cast<const float*>(from);
  auto* columns = reinterpret_cast<float*>(to);
  for (int64_t row = 0; row < TILE; row += 16) {
    for (int64_t pair = 0; pair < dim / 2; pair += 16) {
      at::vec::transpose_mxn<float, 16, 16>(
          pairs + row * (dim / 2) + pair, dim / 2, columns + pair * TILE + row, TILE);
    }
  }
}

void transpose(const BFloat16* from, int64_t dim, BFloat16* to) {
  for (int64_t i = 0; i < dim; ++i) {
    for (int64_t row = 0; row < TILE; ++row) {
      to[i * TILE + row] = from[row * dim + i];
    }
  }
}

// c (rows, columns) = a (rows, inner) b, or is added to; b is packed.
void multiply(const BFloat16* a, const BFloat16* b, float* c, int64_t rows, int64_t columns, int64_t inner, bool add) {
  at::native::cpublas::brgemm(rows, columns, inner, inner, columns, columns, add, a, b, c);
}

void store(const float* from, int64_t count, BFloat16* to) {
  at::vec::convert(from, to, count);
}

// A tile's buffers, of one kind of numbers.
template <typename scalar_t, size_t count>
std::array<std::vector<scalar_t>, count> buffers(int64_t size) {
  std::array<std::vector<scalar_t>, count> all;
  all.fill(std::vector<scalar_t>(size));
  return all;
}

// What is known of the rows of a tile while its keys pass: the largest score so far, and the sum of the weights over it.
struct Rows {
  float most[TILE], sum[TILE];

  Rows() {
    std::fill_n(most, TILE, -std::numeric_limits<float>::infinity());
    std::fill_n(sum, TILE, 0.0f);
  }

  // Scores become weights; returns by what sums of earlier weights are to be multiplied.
  void add(float* scores, BFloat16* weights, float scale, float* faded) {
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
    store(scores, TILE * TILE, weights);
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

const BFloat16* rows_of(const at::Tensor& tensor, int64_t b, int64_t h, int64_t first) {
  return tensor.const_data_ptr<BFloat16>() + b * tensor.stride(0) + h * tensor.stride(1) + first * tensor.stride(2);
}

BFloat16* rows_of(at::Tensor& tensor, int64_t b, int64_t h, int64_t first) {
  return tensor.mutable_data_ptr<BFloat16>() + b * tensor.stride(0) + h * tensor.stride(1) + first * tensor.stride(2);
}

at::Tensor tokens_first(const at::Tensor& tensor) {
  return at::empty({tensor.size(0), tensor.size(2), tensor.size(1), tensor.size(3)}, tensor.options()).transpose(1, 2);
}

// Out (B, H, n, D) and lse (B, H, n) with the sink in it, which is of float32 and broadcast to (B, H, n).
std::tuple<at::Tensor, at::Tensor> attend(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                          const at::Tensor& sink, double scale) {
  const int64_t heads = query.size(1), length = query.size(2), dim = query.size(3), groups = heads / key.size(1);
  const int64_t blocks = at::ceil_div(length, TILE);
  at::Tensor out = tokens_first(query), lse = at::empty(sink.sizes(), sink.options());
  float* lses = lse.mutable_data_ptr<float>();
  const float* sinks = sink.const_data_ptr<float>();

  at::parallel_for(0, query.size(0) * heads * blocks, 1, [&](int64_t begin, int64_t end) {
    auto [rows, tail, packed] = buffers<BFloat16, 3>(TILE * dim);
    std::vector<BFloat16> weights(TILE * TILE);
    std::vector<float> scores(TILE * TILE), sums(TILE * dim);
    float faded[TILE], taken[TILE], kept[TILE], totals[TILE];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / blocks / heads, h = i / blocks % heads, first = i % blocks * TILE;
      const int64_t count = std::min(TILE, length - first);
      copy_rows(rows_of(query, b, h, first), query.stride(2), count, dim, rows.data());
      Rows known;
      for (int64_t start = 0; start <= first; start += TILE) {
        const int64_t keys = std::min(TILE, length - start);
        copy_rows(rows_of(key, b, h / groups, start), key.stride(2), keys, dim, tail.data());
        pack_transposed(tail.data(), dim, packed.data());
        multiply(rows.data(), packed.data(), scores.data(), TILE, TILE, dim, false);
        if (start == first) {
          for (int64_t row = 0; row < TILE; ++row) {
            std::fill(scores.data() + row * TILE + row + 1, scores.data() + (row + 1) * TILE,
                      -std::numeric_limits<float>::infinity());
          }
        }
        known.add(scores.data(), weights.data(), static_cast<float>(scale), faded);
        for (int64_t row = 0; start > 0 && row < TILE; ++row) {
          if (faded[row] != 1) {
            const lanes_t factor(faded[row]);
            for (int64_t column = 0; column < dim; column += LANES) {
              float* at = sums.data() + row * dim + column;
              (lanes_t::loadu(at) * factor).store(at);
            }
          }
        }
        copy_rows(rows_of(value, b, h / groups, start), value.stride(2), keys, dim, tail.data());
        pack(tail.data(), dim, packed.data());
        multiply(weights.data(), packed.data(), sums.data(), TILE, dim, TILE, start > 0);
      }
      const float* sink_from = sinks + b * sink.stride(0) + h * sink.stride(1) + first * sink.stride(2);
      for (int64_t row = 0; row < TILE; ++row) {
        taken[row] = row < count ? sink_from[row * sink.stride(2)] : 0;
      }
      known.finish(taken, kept, totals);
      std::copy_n(totals, count, lses + (b * heads + h) * length + first);
      BFloat16* to = rows_of(out, b, h, first);
      for (int64_t row = 0; row < count; ++row) {
        float* from = sums.data() + row * dim;
        const lanes_t factor(kept[row]);
        at::vec::map<float>([factor](lanes_t x) { return x * factor; }, from, from, dim);
        store(from, dim, to + row * out.stride(2));
      }
    }
    at::native::cpublas::brgemm_release();
  });
  return {out, lse};
}

// Whether there is room for the gradients of a key head's queries.
bool can_differentiate(const at::Tensor& query, const at::Tensor& key) {
  return query.numel() / (query.size(0) * key.size(1)) <= LONGEST;
}

// Gradients of query, key and value; lse is contiguous, grad's last axis too.
std::tuple<at::Tensor, at::Tensor, at::Tensor> differentiate(const at::Tensor& grad, const at::Tensor& query,
                                                             const at::Tensor& key, const at::Tensor& value,
                                                             const at::Tensor& out, const at::Tensor& lse, double scale) {
  const int64_t heads = query.size(1), length = query.size(2), dim = query.size(3);
  const int64_t key_heads = key.size(1), groups = heads / key_heads, blocks = at::ceil_div(length, TILE);
  at::Tensor d_query = tokens_first(query), d_key = tokens_first(key), d_value = tokens_first(value);
  const float* lses = lse.const_data_ptr<float>();

  at::parallel_for(0, query.size(0) * key_heads, 1, [&](int64_t begin, int64_t end) {
    auto [keys, values, transposed, rows, columns, grads, grad_columns] = buffers<BFloat16, 7>(TILE * dim);
    auto [weights, d_scores, packed] = buffers<BFloat16, 3>(TILE * TILE);
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
        dots[row] = !is_row ? 0 : at::vec::map2_reduce_all<BFloat16>(
            [](lanes_t x, lanes_t y) { return x * y; }, [](lanes_t x, lanes_t y) { return x + y; },
            rows_of(grad, b, h, place), rows_of(out, b, h, place), dim);
      }
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t start = block * TILE, count = std::min(TILE, length - start);
        copy_rows(rows_of(key, b, key_head, start), key.stride(2), count, dim, keys.data());
        copy_rows(rows_of(value, b, key_head, start), value.stride(2), count, dim, values.data());
        transpose(keys.data(), dim, transposed.data());
        bool begun = false;
        for (int64_t g = 0; g < groups; ++g) {
          for (int64_t other = block; other < blocks; ++other) {
            const int64_t h = key_head * groups + g, first = other * TILE, some = std::min(TILE, length - first);
            const int64_t place = (g * blocks + other) * TILE;
            copy_rows(rows_of(query, b, h, first), query.stride(2), some, dim, rows.data());
            copy_rows(rows_of(grad, b, h, first), grad.stride(2), some, dim, grads.data());
            // Keys by rows, for then what is known of a row is a lane.
            pack_transposed(rows.data(), dim, columns.data());
            multiply(keys.data(), columns.data(), scores.data(), TILE, TILE, dim, false);
            pack_transposed(grads.data(), dim, grad_columns.data());
            multiply(values.data(), grad_columns.data(), d_weights.data(), TILE, TILE, dim, false);
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
            store(scores.data(), TILE * TILE, weights.data());
            store(d_weights.data(), TILE * TILE, d_scores.data());
            pack(grads.data(), dim, grad_columns.data());
            multiply(weights.data(), grad_columns.data(), value_sums.data(), TILE, dim, TILE, begun);
            pack(rows.data(), dim, columns.data());
            multiply(d_scores.data(), columns.data(), key_sums.data(), TILE, dim, TILE, begun);
            pack(d_scores.data(), TILE, packed.data());
            multiply(transposed.data(), packed.data(), query_sums.data() + place * dim, dim, TILE, TILE, block > 0);
            begun = true;
          }
        }
        for (int64_t row = 0; row < count; ++row) {
          store(key_sums.data() + row * dim, dim, rows_of(d_key, b, key_head, start + row));
          store(value_sums.data() + row * dim, dim, rows_of(d_value, b, key_head, start + row));
        }
      }
      for (int64_t row = 0; row < groups * blocks * TILE; ++row) {
        const int64_t h = key_head * groups + row / (blocks * TILE), place = row % (blocks * TILE);
        if (place < length) {
          const float* from = query_sums.data() + row / TILE * TILE * dim + row % TILE;
          BFloat16* to = rows_of(d_query, b, h, place);
          for (int64_t column = 0; column < dim; ++column) {
            to[column] = from[column * TILE];
          }
        }
      }
    }
    at::native::cpublas::brgemm_release();
  });
  return {d_query, d_key, d_value};
}

} // namespace
} // namespace tiles
} // namespace stablemask
