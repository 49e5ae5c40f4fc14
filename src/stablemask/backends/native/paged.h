// Attention of requests over a paged cache, a share of which a sink takes: what a server asks for. A request has
// new rows, one in decoding, and sees all that is in the cache of it, those rows' keys among them.
//
// A page of a key head has keys and values in turn, [block][2][D]. Rows of decoding read it as in row.h, a page being
// a chunk; the rows of a prompt by tiles.h, whose rows are (token, head of the group), so that a page is read once for
// all heads that share it. What the sink takes follows from a row's position, and is looked up here.

#pragma once

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ceil_div.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "row.h"
#include "tiles.h"

namespace stablemask {
namespace paged {
namespace {

constexpr int64_t FEW_ROWS = 4; // of one request, that read the cache one by one
constexpr int64_t ROWS_AT_ONCE = 128; // whose parts are kept until they are joined

// What the kernels read, by token, request, page and head; library.cpp tells the shapes.
template <typename scalar_t>
class Batch {
 public:
  const int64_t heads, dim, key_heads, block, groups, window;
  const float scale;

  Batch(const at::Tensor& query, const at::Tensor& cache, const at::Tensor& pages, const at::Tensor& starts,
        const at::Tensor& lengths, const at::Tensor& table, const at::Tensor& shift,
        const std::optional<at::Tensor>& slopes, double scale, int64_t window, const at::Tensor& out)
      : heads(query.size(1)), dim(query.size(2)), key_heads(cache.size(1)), block(cache.size(2)),
        groups(heads / key_heads), window(window > 0 ? window : std::numeric_limits<int64_t>::max()),
        scale(static_cast<float>(scale)), query_(query), cache_(cache), pages_(pages), table_(table), shift_(shift),
        out_(out), starts_(starts.const_data_ptr<int32_t>()), lengths_(lengths.const_data_ptr<int32_t>()),
        slopes_(slopes ? slopes->const_data_ptr<float>() : nullptr) {}

  int64_t first_token(int64_t request) const { return starts_[request]; }
  int64_t tokens(int64_t request) const { return starts_[request + 1] - starts_[request]; }
  // Its keys, these tokens' among them.
  int64_t length(int64_t request) const { return lengths_[request]; }
  // The first key that is seen from a position.
  int64_t first_key(int64_t position) const { return std::max<int64_t>(0, position + 1 - window); }

  const scalar_t* query(int64_t token, int64_t head) const {
    return query_.const_data_ptr<scalar_t>() + token * query_.stride(0) + head * query_.stride(1);
  }

  scalar_t* out(int64_t token, int64_t head) const {
    return out_.mutable_data_ptr<scalar_t>() + token * out_.stride(0) + head * out_.stride(1);
  }

  // The key of a place in a request's cache; its value lies `dim` behind it.
  const scalar_t* key(int64_t request, int64_t place, int64_t key_head) const {
    const int64_t page = pages_.const_data_ptr<int32_t>()[request * pages_.stride(0) + place / block];
    return cache_.const_data_ptr<scalar_t>() + page * cache_.stride(0) + key_head * cache_.stride(1) +
        place % block * cache_.stride(2);
  }

  int64_t key_stride() const { return cache_.stride(2); }

  float sink(int64_t position, int64_t head) const {
    const int64_t row = std::min(position, table_.size(0) - 1);
    return table_.const_data_ptr<float>()[row * table_.size(1) + (table_.size(1) > 1 ? head : 0)] +
        shift_.const_data_ptr<float>()[shift_.size(0) > 1 ? head : 0];
  }

  // ALiBi's, 0 where there is none.
  float slope(int64_t head) const { return slopes_ == nullptr ? 0 : slopes_[head]; }
  bool has_slopes() const { return slopes_ != nullptr; }

 private:
  const at::Tensor &query_, &cache_, &pages_, &table_, &shift_, &out_;
  const int32_t *starts_, *lengths_;
  const float* slopes_;
};

struct Row {
  int64_t request, token, position;
};

// What one row and head finds in a page, ALiBi's distances taken off its scores.
template <typename real_t, typename scalar_t>
void attend_page_with_slope(const real_t* row, int64_t width, const Chunk<scalar_t>& keys, const Chunk<scalar_t>& values,
                            float slope, int64_t distance, real_t* scores, real_t* found) {
  constexpr int64_t LANES = Lanes<real_t>::size();
  score<1>(row, width, keys, scores);
  for (int64_t i = 0; i < keys.count; ++i) {
    scores[i] -= static_cast<real_t>(slope) * static_cast<real_t>(distance - i);
  }
  exponentiate(scores, keys.count, found[0], found[1]);
  int64_t d = 0;
  for (; d + LANES <= values.size; d += LANES) {
    mix<1, 1>(scores, values, d, [](const scalar_t* from) { return load(from); }, found + 2, 0);
  }
  if (d < values.size) {
    const auto first = [&](const scalar_t* from) { return load_first<real_t>(from, values.size - d); };
    mix<1, 1>(scores, values, d, first, found + 2, 0);
  }
}

// Rows that read the cache by themselves.
template <typename scalar_t>
void attend_rows(const Batch<scalar_t>& batch, const Row* rows, int64_t count) {
  using real_t = at::opmath_type<scalar_t>;
  constexpr int64_t LANES = Lanes<real_t>::size();
  const int64_t dim = batch.dim, groups = batch.groups, key_heads = batch.key_heads, block = batch.block;
  const int64_t width = at::round_up(dim, LANES), stride = width + 2;
  // (row, page, key head), so that a page's heads are read by one thread where there is a choice.
  std::vector<int64_t> first_page(count), items(count + 1, 0);
  for (int64_t r = 0; r < count; ++r) {
    first_page[r] = batch.first_key(rows[r].position) / block;
    items[r + 1] = items[r] + (rows[r].position / block + 1 - first_page[r]) * key_heads;
  }
  const std::unique_ptr<real_t[]> found(new real_t[items[count] * groups * stride]);
  const auto grain = [](int64_t bytes) { return std::max<int64_t>(1, THREAD_BYTES / bytes); };

  at::parallel_for(0, items[count], grain(block * 2 * dim * sizeof(scalar_t)), [&](int64_t begin, int64_t end) {
    std::vector<real_t> queries(groups * width), scores(4 * CHUNK);
    int64_t r = std::upper_bound(items.begin(), items.end(), begin) - items.begin() - 1;
    for (int64_t i = begin; i < end; ++i) {
      while (i >= items[r + 1]) {
        ++r;
      }
      const auto [request, token, position] = rows[r];
      const int64_t h = (i - items[r]) % key_heads, page = first_page[r] + (i - items[r]) / key_heads;
      const int64_t first = std::max(page * block, batch.first_key(position));
      const int64_t keys_count = std::min((page + 1) * block, position + 1) - first;
      for (int64_t g = 0; g < groups; ++g) {
        const scalar_t* from = batch.query(token, h * groups + g);
        std::transform(from, from + dim, queries.data() + g * width, [&](scalar_t x) {
          return static_cast<real_t>(x) * static_cast<real_t>(batch.scale);
        });
      }
      const scalar_t* data = batch.key(request, first, h);
      const Chunk<scalar_t> keys{data, batch.key_stride(), keys_count, dim};
      const Chunk<scalar_t> values{data + dim, batch.key_stride(), keys_count, dim};
      real_t* part = found.get() + i * groups * stride;
      for (int64_t g = 0, some; g < groups; g += some) {
        const real_t* from = queries.data() + g * width;
        if (batch.has_slopes()) {
          some = 1;
          attend_page_with_slope(from, width, keys, values, batch.slope(h * groups + g), position - first,
                                 scores.data(), part + g * stride);
          continue;
        }
        some = groups - g >= 4 ? 4 : groups - g >= 2 ? 2 : 1;
        const auto attend = some == 4 ? attend_chunk<4, real_t, scalar_t>
            : some == 2               ? attend_chunk<2, real_t, scalar_t>
                                      : attend_chunk<1, real_t, scalar_t>;
        attend(from, width, keys, values, nullptr, scores.data(), part + g * stride, stride);
      }
    }
  });

  at::parallel_for(0, count * batch.heads, grain(stride * sizeof(real_t)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t r = i / batch.heads, head = i % batch.heads;
      real_t* parts = found.get() + ((items[r] + head / groups) * groups + head % groups) * stride;
      join(parts, (items[r + 1] - items[r]) / key_heads, key_heads * groups * stride,
           batch.sink(rows[r].position, head), dim, batch.out(rows[r].token, head));
    }
  });
}

// The right side of the product with the values: packed, or where they are.
const at::BFloat16* values_of(const at::BFloat16* from, int64_t& stride, int64_t count, int64_t dim, at::BFloat16* to) {
  tiles::pack(from, stride, count, dim, to);
  stride = dim;
  return to;
}

const float* values_of(const float* from, int64_t&, int64_t, int64_t, float*) {
  return from;
}

// Requests of more rows, by tiles.
template <typename scalar_t>
void attend_tiles(const Batch<scalar_t>& batch, const std::vector<int64_t>& requests) {
  using namespace tiles;
  constexpr int64_t TILE = 64, STEP = SQUARE * WORD<scalar_t>; // of the columns that are computed
  constexpr float NONE = -std::numeric_limits<float>::infinity();
  const int64_t dim = batch.dim, groups = batch.groups, key_heads = batch.key_heads;
  const int64_t count = requests.size();
  std::vector<int64_t> items(count + 1, 0);
  for (int64_t i = 0; i < count; ++i) {
    items[i + 1] = items[i] + at::ceil_div<int64_t>(batch.tokens(requests[i]) * groups, TILE) * key_heads;
  }
  Buffers buffers(TILE * (sizeof(scalar_t) * (3 * dim + TILE) + sizeof(float) * (dim + TILE)));
  at::parallel_for(0, items[count], 1, [&](int64_t begin, int64_t end) {
    auto memory = buffers.cut();
    auto *rows = memory.template take<scalar_t>(TILE * dim), *tile = memory.template take<scalar_t>(TILE * dim);
    auto *packed = memory.template take<scalar_t>(TILE * dim), *weights = memory.template take<scalar_t>(TILE * TILE);
    auto *scores = memory.template take<float>(TILE * TILE), *sums = memory.template take<float>(TILE * dim);
    float faded[TILE], taken[TILE], kept[TILE], totals[TILE];
    int64_t place = std::upper_bound(items.begin(), items.end(), begin) - items.begin() - 1;
    for (int64_t item = begin; item < end; ++item) {
      while (item >= items[place + 1]) {
        ++place;
      }
      const int64_t request = requests[place], first_token = batch.first_token(request);
      const int64_t length = batch.length(request), past = length - batch.tokens(request);
      const int64_t h = (item - items[place]) % key_heads, first = (item - items[place]) / key_heads * TILE;
      const int64_t height = std::min<int64_t>(TILE, batch.tokens(request) * groups - first);
      const int64_t computed = at::round_up(height, LANES); // oneDNN makes a kernel for each size
      const auto token = [&](int64_t row) { return (first + row) / groups; };
      const auto head = [&](int64_t row) { return h * groups + (first + row) % groups; };
      const auto position = [&](int64_t row) { return past + token(row); };
      for (int64_t row = 0; row < height; ++row) {
        std::copy_n(batch.query(first_token + token(row), head(row)), dim, rows + row * dim);
      }
      const int64_t last = position(height - 1), earliest = batch.first_key(position(0));
      const int64_t start_of_all = earliest / TILE * TILE;
      Rows<TILE> known;
      for (int64_t start = start_of_all; start <= last; start += TILE) {
        const int64_t width = std::min(TILE, at::round_up(last + 1 - start, STEP));
        // Within a page they are read where they are; 0 stands for what no row sees, which may be no number.
        const bool whole = batch.block % TILE == 0 && start >= earliest && start + width <= length;
        const auto read = [&](int64_t offset) {
          if (whole) {
            return std::pair(batch.key(request, start, h) + offset, batch.key_stride());
          }
          for (int64_t i = 0; i < width; ++i) {
            if (start + i >= earliest && start + i < length) {
              std::copy_n(batch.key(request, start + i, h) + offset, dim, tile + i * dim);
            } else {
              std::fill_n(tile + i * dim, dim, scalar_t(0));
            }
          }
          return std::pair(static_cast<const scalar_t*>(tile), dim);
        };
        const auto [keys, key_stride] = read(0);
        multiply<scalar_t>(rows, pack_transposed(keys, key_stride, width, dim, packed), scores, computed, width, dim,
                           false);
        for (int64_t row = 0; batch.has_slopes() && row < height; ++row) {
          const float slope = batch.slope(head(row)) / batch.scale;
          for (int64_t i = 0; i < width; ++i) {
            scores[row * width + i] += slope * static_cast<float>(start + i - position(row));
          }
        }
        if (start + width > position(0) + 1 || start < batch.first_key(last)) {
          for (int64_t row = 0; row < height; ++row) {
            float* of_row = scores + row * width;
            const auto column = [&](int64_t key) { return std::clamp<int64_t>(key - start, 0, width); };
            std::fill(of_row, of_row + column(batch.first_key(position(row))), NONE);
            std::fill(of_row + column(position(row) + 1), of_row + width, NONE);
          }
        }
        known.add(scores, batch.scale, faded, height, width);
        if (start > start_of_all) {
          scale_rows<TILE>(sums, faded, dim, height);
        }
        auto [values, value_stride] = read(dim);
        const scalar_t* right = values_of(values, value_stride, width, dim, packed);
        multiply<scalar_t>(rounded(scores, height * width, weights), right, value_stride, sums, computed, dim, width,
                           start > start_of_all);
      }
      for (int64_t row = 0; row < TILE; ++row) {
        taken[row] = row < height ? batch.sink(position(row), head(row)) : 0;
      }
      known.finish(taken, kept, totals);
      scale_rows<TILE>(sums, kept, dim, height);
      for (int64_t row = 0; row < height; ++row) {
        at::vec::convert(sums + row * dim, batch.out(first_token + token(row), head(row)), dim);
      }
    }
    at::native::cpublas::brgemm_release();
  });
}

// Writes `out`.
void attend(const at::Tensor& query, const at::Tensor& cache, const at::Tensor& pages, const at::Tensor& starts,
            const at::Tensor& lengths, const at::Tensor& table, const at::Tensor& shift,
            const std::optional<at::Tensor>& slopes, double scale, int64_t window, const at::Tensor& out) {
  const bool by_tiles = tiles::serve(query.scalar_type(), query.size(2));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, query.scalar_type(), "paged_attention", [&] {
    const Batch<scalar_t> batch(query, cache, pages, starts, lengths, table, shift, slopes, scale, window, out);
    std::vector<Row> rows;
    std::vector<int64_t> requests;
    for (int64_t request = 0; request < lengths.size(0); ++request) {
      const int64_t tokens = batch.tokens(request), past = batch.length(request) - tokens;
      if (by_tiles && tokens > FEW_ROWS) {
        requests.push_back(request);
        continue;
      }
      for (int64_t token = 0; token < tokens; ++token) {
        rows.push_back({request, batch.first_token(request) + token, past + token});
      }
    }
    for (size_t first = 0; first < rows.size(); first += ROWS_AT_ONCE) {
      attend_rows(batch, rows.data() + first, std::min<int64_t>(ROWS_AT_ONCE, rows.size() - first));
    }
    if constexpr (std::is_same_v<scalar_t, float> || std::is_same_v<scalar_t, at::BFloat16>) {
      attend_tiles(batch, requests);
    }
  });
}

// Keys and values (T, KH, D) to their slots; a negative one is padding.
void write(const at::Tensor& key, const at::Tensor& value, const at::Tensor& slots, const at::Tensor& cache) {
  const int64_t heads = cache.size(1), block = cache.size(2), size = cache.element_size();
  const int64_t bytes = cache.size(3) / 2 * size;
  const auto* slot = slots.const_data_ptr<int64_t>();
  const auto *keys = static_cast<const char*>(key.const_data_ptr()), *values = static_cast<const char*>(value.const_data_ptr());
  auto* pages = static_cast<char*>(cache.mutable_data_ptr());
  const int64_t grain = std::max<int64_t>(1, THREAD_BYTES / (heads * bytes * 2));
  at::parallel_for(0, slots.size(0), grain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t h = 0; slot[t] >= 0 && h < heads; ++h) {
        char* to = pages +
            (slot[t] / block * cache.stride(0) + h * cache.stride(1) + slot[t] % block * cache.stride(2)) * size;
        std::memcpy(to, keys + (t * key.stride(0) + h * key.stride(1)) * size, bytes);
        std::memcpy(to + bytes, values + (t * value.stride(0) + h * value.stride(1)) * size, bytes);
      }
    }
  });
}

} // namespace
} // namespace paged
} // namespace stablemask
