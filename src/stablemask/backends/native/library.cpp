// The operators of the compiled library, one for the forward and one for its gradients, as PyTorch's dispatcher and
// autograd know them. backend.py says what calls they serve, and what shapes they return.
//
//     native_forward(query, key, value, sink_logits, attn_mask, scale) -> out, lse
//     native_backward(grad, query, key, value, sink_logits, attn_mask, out, lse, scale, of_sink)
//         -> d_query, d_key, d_value, d_sink
//     paged_attention, paged_write: of a server's cache (paged.h); ../../vllm/cpu.py calls them
//
// Rows are one per sequence, behind a cache (row.h), or as many as keys (causal.h). Checked here is what reading
// memory depends on; what a user may get wrong is said in Python.

#include <ATen/Dispatch.h>
#include <ATen/ExpandUtils.h>
#include <ATen/OpMathType.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <limits>
#include <optional>
#include <tuple>
#include <utility>

#include "causal.h"
#include "paged.h"
#include "row.h"
#include "rules.h"
#include "sink.h"

namespace {

using stablemask::Sinks;

// Of bool, which keys a sequence sees.
using Mask = std::optional<at::Tensor>;
using Forward = std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                                   const at::Tensor&, const Mask&, double);
using Backward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>(
    const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const Mask&,
    const at::Tensor&, const at::Tensor&, double, bool);

template <typename Signature>
c10::TypedOperatorHandle<Signature> operator_of(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// Four numbers for each interval: the way, the dtype, the first and the last of the rows.
void set_rules(at::IntArrayRef numbers) {
  stablemask::Rules rules;
  for (size_t i = 0; i + 4 <= numbers.size(); i += 4) {
    rules.at(numbers[i]).at(numbers[i + 1]).emplace_back(numbers[i + 2], numbers[i + 3]);
  }
  stablemask::rules = std::move(rules);
}

at::Tensor with_dense_rows(const at::Tensor& tensor) {
  return tensor.stride(-1) == 1 ? tensor : tensor.contiguous();
}

// Tokens first in memory, which is what is promised to compilers, whatever a kernel makes of its arguments' order.
at::Tensor in_order(const at::Tensor& tensor) {
  return tensor.transpose(1, 2).contiguous().transpose(1, 2);
}

void check(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& sink,
           const Mask& mask) {
  const auto dtype = query.scalar_type();
  TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && value.dim() == 4 && sink.dim() == 3,
              "query, key and value have four axes, and sink_logits three");
  TORCH_CHECK(query.numel() > 0 && key.numel() > 0 && value.numel() > 0, "nothing to compute");
  TORCH_CHECK(value.sizes().slice(0, 3) == key.sizes().slice(0, 3) && key.size(0) == query.size(0) &&
                  key.size(3) == query.size(3) && query.size(1) % key.size(1) == 0 &&
                  at::is_expandable_to(sink.sizes(), query.sizes().slice(0, 3)),
              "sizes do not fit: query ", query.sizes(), ", key ", key.sizes(), ", value ", value.sizes(),
              ", sink_logits ", sink.sizes());
  TORCH_CHECK(at::isFloatingType(dtype) && key.scalar_type() == dtype && value.scalar_type() == dtype &&
                  at::isFloatingType(sink.scalar_type()),
              "query, key and value share a floating dtype, and sink_logits has one");
  for (const at::Tensor* tensor : {&query, &key, &value, &sink}) {
    TORCH_CHECK(tensor->is_cpu(), "all tensors are on the CPU");
  }
  const bool is_row = query.size(2) == 1;
  TORCH_CHECK(is_row || query.size(2) == key.size(2), "there is one row, or as many as keys");
  TORCH_CHECK(!mask || (is_row && mask->is_cpu() && mask->scalar_type() == at::kBool && mask->dim() == 4 &&
                        at::is_expandable_to(mask->sizes(), {key.size(0), 1, 1, key.size(2)})),
              "attn_mask is of bool, (batch or 1, 1, 1, kv_len), and for one row");
}

// Those of a row, by sequence and head.
Sinks sinks_of_row(const at::Tensor& sink, const at::Tensor& query) {
  const int64_t heads = query.size(1), count = sink.numel() == 1 ? 1 : query.size(0) * heads;
  const int64_t batch_stride = sink.size(0) > 1 ? sink.stride(0) : 0;
  const int64_t head_stride = sink.size(1) > 1 ? sink.stride(1) : 0;
  Sinks sinks(count);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, sink.scalar_type(), "sinks_of_row", [&] {
    const scalar_t* logits = sink.const_data_ptr<scalar_t>();
    for (int64_t i = 0; i < count; ++i) {
      sinks[i] = static_cast<double>(logits[i / heads * batch_stride + i % heads * head_stride]);
    }
  });
  return sinks;
}

// Out (B, H, n, V) and lse (B, H, n), with the sink in it, in float32 or, of double, double.
std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                           const at::Tensor& sink, const Mask& mask, double scale) {
  check(query, key, value, sink, mask);
  const at::AutoDispatchBelowADInplaceOrView guard;
  const at::Tensor rows = with_dense_rows(query), keys = with_dense_rows(key), values = with_dense_rows(value);
  if (query.size(2) > 1) {
    TORCH_CHECK(value.size(3) == key.size(3) && scale >= std::numeric_limits<float>::min(),
                "a sequence has one head_dim, and a scale above 0");
    const auto [out, lse] = stablemask::attend_causally(rows, keys, values, sink, scale);
    return {in_order(out), lse};
  }
  const at::Tensor seen = mask ? with_dense_rows(mask->expand({key.size(0), 1, 1, key.size(2)})) : at::Tensor();
  std::tuple<at::Tensor, at::Tensor> found;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, query.scalar_type(), "attend_row", [&] {
    found = stablemask::attend_row<scalar_t>(rows, keys, values, seen, sinks_of_row(sink, query), scale);
  });
  return found;
}

// Of the sizes of query, key, value and sink_logits; the last is empty where it is not asked for.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward(
    const at::Tensor& grad, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const at::Tensor& sink, const Mask& mask, const at::Tensor& out, const at::Tensor& lse, double scale, bool of_sink) {
  check(query, key, value, sink, mask);
  TORCH_CHECK(value.size(3) == key.size(3) && scale >= std::numeric_limits<float>::min(),
              "gradients take one head_dim, and a scale above 0");
  TORCH_CHECK(grad.sizes() == query.sizes() && out.sizes() == query.sizes() && lse.sizes() == query.sizes().slice(0, 3) &&
                  grad.scalar_type() == query.scalar_type() && out.scalar_type() == query.scalar_type() &&
                  lse.scalar_type() == at::toOpMathType(query.scalar_type()),
              "grad and out are like query, and lse has a number for each row");
  const at::AutoDispatchBelowADInplaceOrView guard;
  const auto [d_query, d_key, d_value, d_sink] = stablemask::differentiate(
      with_dense_rows(grad), with_dense_rows(query), with_dense_rows(key), with_dense_rows(value), sink, mask,
      with_dense_rows(out), lse.contiguous(), scale, of_sink);
  return {in_order(d_query), in_order(d_key), in_order(d_value), d_sink};
}

std::tuple<at::Tensor, at::Tensor> call_forward(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                                const at::Tensor& sink, const Mask& mask, double scale) {
  static const auto call = operator_of<Forward>("stablemask::native_forward");
  const at::AutoDispatchBelowADInplaceOrView guard;
  return call.call(query, key, value, sink, mask, scale);
}

// The operator, whoever watches; lse goes to its place, for it has no gradient.
struct Attend : torch::autograd::Function<Attend> {
  static constexpr bool is_traceable = true; // by compiled autograd, for the backward is an operator too

  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& query, const at::Tensor& key,
                            const at::Tensor& value, const at::Tensor& sink, const Mask& mask, double scale,
                            at::Tensor* lse_to) {
    const auto [out, lse] = call_forward(query, key, value, sink, mask, scale);
    context->save_for_backward({query, key, value, sink, mask.value_or(at::Tensor()), out, lse});
    context->saved_data["scale"] = scale;
    *lse_to = lse;
    return out;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& grads) {
    static const auto call = operator_of<Backward>("stablemask::native_backward");
    if (!grads[0].defined()) {
      return torch::autograd::variable_list(7);
    }
    const auto saved = context->get_saved_variables();
    const Mask mask = saved[4].defined() ? Mask(saved[4]) : std::nullopt;
    const bool of_sink = context->needs_input_grad(3);
    auto [d_query, d_key, d_value, d_sink] = call.call(grads[0], saved[0], saved[1], saved[2], saved[3], mask, saved[5],
                                                       saved[6], context->saved_data["scale"].toDouble(), of_sink);
    return {d_query, d_key, d_value, of_sink ? d_sink : at::Tensor(), {}, {}, {}};
  }
};

std::tuple<at::Tensor, at::Tensor> forward_in_autograd(const at::Tensor& query, const at::Tensor& key,
                                                       const at::Tensor& value, const at::Tensor& sink, const Mask& mask,
                                                       double scale) {
  if (at::GradMode::is_enabled() &&
      (query.requires_grad() || key.requires_grad() || value.requires_grad() || sink.requires_grad())) {
    at::Tensor lse;
    at::Tensor out = Attend::apply(query, key, value, sink, mask, scale, &lse);
    return {out, lse};
  }
  return call_forward(query, key, value, sink, mask, scale);
}

// Gradients, which have none themselves.
struct Differentiate : torch::autograd::Function<Differentiate> {
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext*, const at::Tensor& grad,
                                                const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                                const at::Tensor& sink, const Mask& mask, const at::Tensor& out,
                                                const at::Tensor& lse, double scale, bool of_sink) {
    static const auto call = operator_of<Backward>("stablemask::native_backward");
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [d_query, d_key, d_value, d_sink] =
        call.call(grad, query, key, value, sink, mask, out, lse, scale, of_sink);
    return {d_query, d_key, d_value, d_sink};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext*, const torch::autograd::variable_list&) {
    TORCH_CHECK(false, "the flash kernels cannot be differentiated twice; use backend='reference' for "
                       "second-order gradients");
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward_in_autograd(
    const at::Tensor& grad, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const at::Tensor& sink, const Mask& mask, const at::Tensor& out, const at::Tensor& lse, double scale, bool of_sink) {
  auto found = Differentiate::apply(grad, query, key, value, sink, mask, out, lse, scale, of_sink);
  return {found[0], found[1], found[2], found[3]};
}

// A cache is (pages, key heads, block, 2 head_dim), its last two axes contiguous.
void check_cache(const at::Tensor& cache, const at::Tensor& like) {
  TORCH_CHECK(cache.dim() == 4 && like.dim() == 3 && cache.is_cpu() && cache.scalar_type() == like.scalar_type() &&
                  cache.size(3) == 2 * like.size(2) && cache.stride(3) == 1 && cache.size(2) <= stablemask::CHUNK,
              "a cache of ", cache.sizes(), " does not fit heads of ", like.sizes());
}

void attend_paged(const at::Tensor& query, const at::Tensor& cache, const at::Tensor& pages, const at::Tensor& starts,
                  const at::Tensor& lengths, const at::Tensor& table, const at::Tensor& shift,
                  const std::optional<at::Tensor>& slopes, double scale, int64_t window, at::Tensor& out) {
  check_cache(cache, query);
  const int64_t requests = lengths.numel(), heads = query.size(1);
  const auto fits_heads = [heads](int64_t size) { return size == 1 || size == heads; };
  TORCH_CHECK(heads % cache.size(1) == 0 && out.sizes() == query.sizes() && out.scalar_type() == query.scalar_type() &&
                  out.stride(2) == 1 && query.stride(2) == 1,
              "sizes do not fit: query ", query.sizes(), ", cache ", cache.sizes(), ", out ", out.sizes());
  TORCH_CHECK(pages.dim() == 2 && pages.size(0) >= requests && pages.stride(1) == 1 && starts.numel() == requests + 1 &&
                  pages.scalar_type() == at::kInt && starts.scalar_type() == at::kInt &&
                  lengths.scalar_type() == at::kInt && starts.is_contiguous() && lengths.is_contiguous(),
              "pages (requests, most), starts (requests + 1) and lengths (requests) are int32");
  TORCH_CHECK(table.dim() == 2 && table.size(0) > 0 && fits_heads(table.size(1)) && shift.dim() == 1 &&
                  fits_heads(shift.size(0)) && table.is_contiguous() && shift.is_contiguous() &&
                  table.scalar_type() == at::kFloat && shift.scalar_type() == at::kFloat &&
                  (!slopes || (slopes->scalar_type() == at::kFloat && slopes->numel() == heads && slopes->is_contiguous())),
              "table (positions, 1 or heads), shift (1 or heads) and slopes (heads) are float32");
  stablemask::paged::attend(query, cache, pages, starts, lengths, table, shift, slopes, scale, window, out);
}

void write_paged(const at::Tensor& key, const at::Tensor& value, const at::Tensor& slots, at::Tensor& cache) {
  check_cache(cache, key);
  TORCH_CHECK(value.sizes() == key.sizes() && value.scalar_type() == key.scalar_type() && key.size(1) == cache.size(1) &&
                  key.stride(2) == 1 && value.stride(2) == 1 && slots.scalar_type() == at::kLong &&
                  slots.is_contiguous() && slots.numel() <= key.size(0),
              "key ", key.sizes(), " and value ", value.sizes(), " do not fit ", slots.sizes(), " slots");
  stablemask::paged::write(key, value, slots, cache);
}

} // namespace

TORCH_LIBRARY_FRAGMENT(stablemask, library) {
  library.def("native_rules(int[] numbers) -> ()", set_rules);
  library.def("native_forward(Tensor query, Tensor key, Tensor value, Tensor sink_logits, Tensor? attn_mask, "
              "float scale) -> (Tensor, Tensor)");
  library.def("native_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor sink_logits, "
              "Tensor? attn_mask, Tensor out, Tensor lse, float scale, bool of_sink) -> (Tensor, Tensor, Tensor, Tensor)");
  library.def("paged_attention(Tensor query, Tensor cache, Tensor pages, Tensor starts, Tensor lengths, Tensor table, "
              "Tensor shift, Tensor? slopes, float scale, int window, Tensor(a!) out) -> ()");
  library.def("paged_write(Tensor key, Tensor value, Tensor slots, Tensor(a!) cache) -> ()");
}

TORCH_LIBRARY_IMPL(stablemask, CPU, library) {
  library.impl("native_forward", forward);
  library.impl("native_backward", backward);
  library.impl("paged_attention", attend_paged);
  library.impl("paged_write", write_paged);
}

TORCH_LIBRARY_IMPL(stablemask, Autograd, library) {
  library.impl("native_forward", forward_in_autograd);
  library.impl("native_backward", backward_in_autograd);
}
