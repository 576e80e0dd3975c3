// The two calls that XLA makes.  Arrays that there are none of come with no elements.
#pragma once

#include "backward.h"
#include "memory.h"

namespace rnn {

constexpr auto kReal = sizeof(real) == 4 ? ffi::F32 : ffi::F64;
using Array = ffi::Buffer<kReal>;
using Result = ffi::ResultBuffer<kReal>;

inline const real* or_null(const Array& a) { return a.element_count() ? a.typed_data() : nullptr; }

inline Sizes sizes_of(const Array& x, const Array& w, const Array& u, bool time_major) {
  auto xs = x.dimensions(), ws = w.dimensions();
  return Sizes(time_major ? xs[0] : xs[1], time_major ? xs[1] : xs[0], xs[2], ws[2], u.dimensions()[0], time_major);
}

inline void append(std::vector<int64_t>& to, const std::vector<int64_t>& more) {
  to.insert(to.end(), more.begin(), more.end());
}

// Of all parts, whose sizes differ by one sequence, the most that each piece of working memory holds.
template <class Work>
std::vector<int64_t> largest(const std::vector<Work>& work) {
  std::vector<int64_t> most = work[0].sizes();
  for (const Work& one : work) {
    const auto sizes = one.sizes();
    for (size_t n = 0; n < most.size(); n++) most[n] = std::max(most[n], sizes[n]);
  }
  return most;
}

// Bytes of the arrays over time that a run writes, its backward one included.
struct Written {
  size_t y, kept, dx;
  Written(const Sizes& s, bool keep) {
    const size_t line = s.steps * s.batch * sizeof(real);
    y = line * s.hidden, kept = keep ? line * s.units * Cell::residuals : 0, dx = keep ? line * s.inputs : 0;
  }
  size_t all() const { return y + kept + dx; }
};

template <bool Keep>
void run_forward(ffi::ThreadPool& pool, const Sizes& s, const Inputs& in, const Outputs& out) {
  const Written bytes(s, Keep);
  expect_writing(out.y, bytes.y, bytes.all());
  if (Keep) expect_writing(out.kept, bytes.kept, bytes.all());
  const Parts split(s, 1, pool);
  const int64_t count = split.count();
  Weights weights;
  std::vector<Forward<Keep>> work;
  work.reserve(count);
  for (int64_t n = 0; n < count; n++) work.emplace_back(s, in, weights, out, split.first(n), split.end(n));
  auto sizes = Weights::sizes(s);
  const size_t shared = sizes.size();
  const auto own = largest(work);
  for (int64_t n = 0; n < split.slots(s, pool); n++) append(sizes, own);
  Memory memory;
  auto parts = memory.parts(sizes);
  weights = Weights(parts.data());
  parallel(pool, s.blocks, 8 * s.weights(), [&](int64_t block, int64_t) { weights.pack(s, in, block); });
  std::vector<Team> teams = split.teams();
  parallel(pool, count * split.team, s.products(), [&](int64_t n, int64_t thread) {
    const int64_t part = n % count;
    Forward<Keep> mine = work[part];
    mine.set(&parts[shared + split.slot(part, thread) * own.size()]);
    mine.run(teams[part], split.together);
  });
}

inline void run_backward(ffi::ThreadPool& pool, int64_t groups, const Sizes& s, const Inputs& in, const real* y,
                         const real* kept, const Cotangents& given, const Gradients& out) {
  const Written bytes(s, true);
  if (out.x) expect_writing(out.x, bytes.dx, bytes.all());
  const Parts split(s, groups, pool);
  const int64_t count = split.count();
  int64_t apart = 0;  // between the sums of one part and the next
  for (int64_t n : Sums::sizes(s)) apart += rounded(n, kPad);
  Transposes p(s);
  std::vector<Backward> work;
  work.reserve(count);
  for (int64_t n = 0; n < count; n++) work.emplace_back(s, in, p, y, kept, given, out, split.first(n), split.end(n));
  auto sizes = Transposes::sizes(s, out.x);
  sizes.push_back(count * apart);
  const size_t shared = sizes.size();
  const auto own = largest(work);
  for (int64_t n = 0; n < split.slots(s, pool); n++) append(sizes, own);
  Memory memory;
  auto parts = memory.parts(sizes);
  real* const sums = parts[shared - 1];
  p.set(parts.data(), out.x);
  parallel(pool, s.blocks, 8 * s.weights(), [&](int64_t block, int64_t) { p.pack(s, in, block); });
  parallel(pool, count, 8 * count * s.weights(),
           [&](int64_t n, int64_t) { std::fill_n(sums + n * apart, apart, real(0)); });
  std::vector<Team> teams = split.teams();
  parallel(pool, count * split.team, s.products(), [&](int64_t n, int64_t thread) {
    const int64_t part = n % count;
    Backward mine = work[part];
    mine.set(&parts[shared + split.slot(part, thread) * own.size()], Sums(s, sums, part * apart));
    mine.run(teams[part], split.together);
  });
  parallel(pool, groups * s.blocks, 8 * count * s.weights(), [&](int64_t n, int64_t) {
    const int64_t group = n / s.blocks, block = n % s.blocks, head = s.head_of(block);
    const Sums first(s, sums, group * split.each * apart);
    const int64_t of_head = (group * s.heads + head) * s.head * kGates * s.head;
    unpack_columns(s, first.w, split.each, apart, s.inputs, s.hidden, s.first(block), block,
                   out.w + group * s.inputs * kGates * s.hidden);
    unpack_columns(s, first.u, split.each, apart, s.head, s.head, s.first(block) - head * s.head, block,
                   out.u + of_head);
    unpack_rows(s, first.bias, split.each, apart, kGates, block, out.bias + group * kGates * s.hidden);
    unpack_rows(s, first.rest_bias, split.each, apart, Cell::rest, block,
                out.rest_bias + group * Cell::rest * s.hidden);
    unpack_rows(s, first.units, split.each, apart, Cell::units, block, out.units + group * Cell::units * s.hidden);
  });
}

inline Inputs inputs_of(const Array& x, const Array& w, const Array& u, const Array& bias, const Array& rest_bias,
                        const Array& units, const Array& start, const Array& target, const Array& recurrent_mask,
                        const ffi::Buffer<ffi::S32>& lengths, const ffi::Buffer<ffi::PRED>& resets) {
  return {x.typed_data(),
          w.typed_data(),
          u.typed_data(),
          or_null(bias),
          or_null(rest_bias),
          or_null(units),
          start.typed_data(),
          or_null(target),
          or_null(recurrent_mask),
          lengths.element_count() ? lengths.typed_data() : nullptr,
          resets.element_count() ? resets.typed_data() : nullptr};
}

template <class Body>
ffi::Error said(Body&& body) {
  try {
    body();
    return ffi::Error::Success();
  } catch (const std::exception& error) {
    return ffi::Error::Internal(std::string("rnncore's C++ loop: ") + error.what());
  }
}

template <bool Keep>
ffi::Error forward(ffi::ThreadPool pool, bool time_major, Array x, Array w, Array u, Array bias, Array rest_bias,
                   Array units, Array start, Array target, Array recurrent_mask, ffi::Buffer<ffi::S32> lengths,
                   ffi::Buffer<ffi::PRED> resets, Result y, Result last, Result kept) {
  const Inputs in = inputs_of(x, w, u, bias, rest_bias, units, start, target, recurrent_mask, lengths, resets);
  return said([&] {
    run_forward<Keep>(pool, sizes_of(x, w, u, time_major), in,
                      {y->typed_data(), last->typed_data(), kept->typed_data()});
  });
}

inline ffi::Error backward(ffi::ThreadPool pool, bool time_major, int64_t groups, Array x, Array w, Array u, Array bias,
                           Array rest_bias, Array units, Array start, Array target, Array recurrent_mask,
                           ffi::Buffer<ffi::S32> lengths, ffi::Buffer<ffi::PRED> resets, Array y, Array kept, Array dy,
                           Array dlast, Result dx, Result dw, Result du, Result dbias, Result drest_bias, Result dunits,
                           Result dstart, Result dtarget) {
  const Inputs in = inputs_of(x, w, u, bias, rest_bias, units, start, target, recurrent_mask, lengths, resets);
  real* to_x = dx->element_count() ? dx->typed_data() : nullptr;
  return said([&] {
    run_backward(pool, groups, sizes_of(x, w, u, time_major), in, y.typed_data(), kept.typed_data(),
                 {dy.typed_data(), dlast.typed_data()},
                 {to_x, dw->typed_data(), du->typed_data(), dbias->typed_data(), drest_bias->typed_data(),
                  dunits->typed_data(), dstart->typed_data(), dtarget->typed_data()});
  });
}

inline auto bind() { return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attr<bool>("time_major"); }

template <class Bound>
auto with_inputs(Bound&& bound) {
  return std::move(bound)
      .template Arg<Array>()
      .template Arg<Array>()
      .template Arg<Array>()
      .template Arg<Array>()
      .template Arg<Array>()
      .template Arg<Array>()
      .template Arg<Array>()
      .template Arg<Array>()
      .template Arg<Array>()
      .template Arg<ffi::Buffer<ffi::S32>>()
      .template Arg<ffi::Buffer<ffi::PRED>>();
}

}  // namespace rnn

// All else is hidden: symbols of two cells that are loaded into one process have the same names.
#define RNN_VISIBLE extern "C" __attribute__((visibility("default")))
RNN_VISIBLE XLA_FFI_Error* rnn_forward(XLA_FFI_CallFrame*);
RNN_VISIBLE XLA_FFI_Error* rnn_forward_keeping(XLA_FFI_CallFrame*);
RNN_VISIBLE XLA_FFI_Error* rnn_backward(XLA_FFI_CallFrame*);

XLA_FFI_DEFINE_HANDLER_SYMBOL(rnn_forward, rnn::forward<false>,
                              rnn::with_inputs(rnn::bind()).Ret<rnn::Array>().Ret<rnn::Array>().Ret<rnn::Array>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(rnn_forward_keeping, rnn::forward<true>,
                              rnn::with_inputs(rnn::bind()).Ret<rnn::Array>().Ret<rnn::Array>().Ret<rnn::Array>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(rnn_backward, rnn::backward,
                              rnn::with_inputs(rnn::bind().Attr<int64_t>("groups"))
                                  .Arg<rnn::Array>()
                                  .Arg<rnn::Array>()
                                  .Arg<rnn::Array>()
                                  .Arg<rnn::Array>()
                                  .Ret<rnn::Array>()
                                  .Ret<rnn::Array>()
                                  .Ret<rnn::Array>()
                                  .Ret<rnn::Array>()
                                  .Ret<rnn::Array>()
                                  .Ret<rnn::Array>()
                                  .Ret<rnn::Array>()
                                  .Ret<rnn::Array>());
