// The two calls that XLA makes.  Arrays that there are none of come with no elements.
#pragma once

#include "backward.h"
#include "memory.h"

namespace rnn {

template <class T>
constexpr ffi::DataType type_of() {
  if constexpr (std::is_same_v<T, bfloat16>) return ffi::BF16;
  if constexpr (std::is_same_v<T, double>) return ffi::F64;
  return sizeof(T) == 2 ? ffi::F16 : ffi::F32;
}
template <class T>
using Of = ffi::Buffer<type_of<T>()>;
template <class T>
using ResultOf = ffi::ResultBuffer<type_of<T>()>;
using Array = Of<real>;          // parameters and carries
using Stack = Of<stored>;        // arrays over time
using Kept = Of<residual>;       // what the derivative needs
using Booleans = ffi::Buffer<ffi::PRED>;
using Integers = ffi::Buffer<ffi::S32>;

// bfloat16 and float16 lie in memory as XLA's do, under names of their own.
template <class T, class B>
const T* data(const B& a) {
  return a.element_count() ? reinterpret_cast<const T*>(a.untyped_data()) : nullptr;
}
template <class T, class B>
T* data(ffi::Result<B>& a) {
  return a->element_count() ? reinterpret_cast<T*>(a->untyped_data()) : nullptr;
}

inline Sizes sizes_of(const Stack& x, const Array& w, const Array& u, bool time_major) {
  auto xs = x.dimensions(), ws = w.dimensions(), us = u.dimensions();
  const bool diagonal = us.size() == 2;
  return Sizes(time_major ? xs[0] : xs[1], time_major ? xs[1] : xs[0], xs[2], ws[2], diagonal ? 1 : us[0], diagonal,
               time_major);
}

// `kinds` of all fields; their shares for all steps, booleans and shares (T, B, H) one after the other.
inline Zoneout zoneout_of(const Sizes& s, ffi::Span<const int64_t> kinds, const Array& share, const Booleans& chosen,
                          const Array& shares) {
  Zoneout all;
  const int64_t apart = s.steps * s.batch * s.hidden;
  int64_t chosens = 0, stacks = 0;
  for (int f = 0; f < Cell::fields && size_t(f) < kinds.size(); f++) {
    all.kinds[f] = Zoneout::Kind(kinds[f]);
    all.any |= kinds[f] != Zoneout::kNone;
    if (kinds[f] == Zoneout::kShare) all.share[f] = share.typed_data()[f];
    if (kinds[f] == Zoneout::kChosen) all.chosen[f] = chosen.typed_data() + apart * chosens++;
    if (kinds[f] == Zoneout::kShares) all.shares[f] = shares.typed_data() + apart * stacks++;
  }
  return all;
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
    const size_t line = s.steps * s.batch;
    y = line * s.hidden * sizeof(stored), kept = keep ? line * s.units * Cell::residuals * sizeof(residual) : 0,
    dx = keep ? line * s.inputs * sizeof(stored) : 0;
  }
  size_t all() const { return y + kept + dx; }
};

template <bool Keep>
void run_forward(ffi::ThreadPool& pool, const Sizes& s, const Inputs& in, const Outputs& out, residual* kept) {
  const Written bytes(s, Keep);
  expect_writing(out.y, bytes.y, bytes.all());
  if (Keep) expect_writing(kept, bytes.kept, bytes.all());
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
    if (Keep) mine.keep_in(Residuals(s, kept, s.batch, 0, 0));
    mine.run(teams[part], split.together);
  });
}

inline void run_backward(ffi::ThreadPool& pool, int64_t groups, const Sizes& s, const Inputs& in, const stored* y,
                         residual* kept, const Outputs& begins, const Cotangents& given, const Gradients& out) {
  const Written bytes(s, !begins.begins);
  if (out.x) expect_writing(out.x, bytes.dx, bytes.all());
  const Parts split(s, groups, pool);
  const int64_t count = split.count();
  int64_t apart = 0;  // between the sums of one part and the next
  for (int64_t n : Sums::sizes(s)) apart += rounded(n, kPad);
  Transposes p(s);
  Weights weights;
  std::vector<Backward> work;
  work.reserve(count);
  for (int64_t n = 0; n < count; n++) work.emplace_back(s, in, weights, p, y, kept, begins, given, out, split.first(n), split.end(n));
  auto sizes = Transposes::sizes(s, out.x);
  sizes.push_back(count * apart);
  if (begins.begins) append(sizes, Weights::sizes(s));
  const size_t shared = sizes.size();
  const auto own = largest(work);
  for (int64_t n = 0; n < split.slots(s, pool); n++) append(sizes, own);
  Memory memory;
  auto parts = memory.parts(sizes);
  real* const sums = parts[3];
  p.set(parts.data(), out.x);
  if (begins.begins) weights = Weights(parts.data() + 4);
  parallel(pool, s.blocks, 8 * s.weights(), [&](int64_t block, int64_t) {
    p.pack(s, in, block);
    if (begins.begins) weights.pack(s, in, block);
  });
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
    const int64_t of_head = (group * s.heads + head) * s.depth * kGates * s.head;
    unpack_columns(s, first.w, split.each, apart, s.inputs, s.hidden, s.first(block), block,
                   out.w + group * s.inputs * kGates * s.hidden);
    if (s.diagonal)
      unpack_rows(s, first.u, split.each, apart, kGates, block, out.u + of_head);
    else
      unpack_columns(s, first.u, split.each, apart, s.head, s.head, s.first(block) - head * s.head, block,
                     out.u + of_head);
    unpack_rows(s, first.bias, split.each, apart, kGates, block, out.bias + group * kGates * s.hidden);
    unpack_rows(s, first.rest_bias, split.each, apart, Cell::rest, block,
                out.rest_bias + group * Cell::rest * s.hidden);
    unpack_rows(s, first.units, split.each, apart, Cell::units, block, out.units + group * Cell::units * s.hidden);
  });
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

// Carries are kept as they are, where a cell's residuals may be of another type.
inline real* carries(residual* kept) {
  if constexpr (!std::is_same_v<residual, real>) throw std::invalid_argument("carries are kept in the dtype of sums");
  return reinterpret_cast<real*>(kept);
}

// The operands of all calls, in their order.
#define RNN_OPERANDS                                                                                               \
  ffi::ThreadPool pool, bool time_major, int64_t groups, int64_t every, ffi::Span<const int64_t> kinds, Stack x, \
      Array w, Array u, \
      Array bias, Array rest_bias, Array units, Array start, Array target, Array recurrent_mask, Integers lengths, \
      Booleans resets, Array share, Booleans chosen, Array shares
#define RNN_INPUTS                                                                                           \
  const Sizes s = sizes_of(x, w, u, time_major);                                                             \
  const Inputs in {                                                                                          \
    data<stored>(x), data<real>(w), data<real>(u), data<real>(bias), data<real>(rest_bias), data<real>(units), \
        data<real>(start), data<real>(target), data<real>(recurrent_mask), data<int32_t>(lengths),           \
        data<bool>(resets), zoneout_of(s, kinds, share, chosen, shares)                                      \
  }

// every: 0, or to keep the carry before every so many steps, and nothing else, from which stretches are run again.
template <bool Keep>
ffi::Error forward(RNN_OPERANDS, ResultOf<stored> y, ResultOf<real> last, ResultOf<residual> kept,
                   ResultOf<stored> states) {
  RNN_INPUTS;
  Outputs out{data<stored>(y), data<stored>(states), data<real>(last), nullptr, every};
  return said([&] {
    if (Keep && every) {
      out.begins = carries(data<residual>(kept));
      return run_forward<false>(pool, s, in, out, nullptr);
    }
    run_forward<Keep>(pool, s, in, out, data<residual>(kept));
  });
}

inline ffi::Error backward(RNN_OPERANDS, Stack y, Kept kept, Stack dy, Array dlast, Stack dstates,
                           ResultOf<stored> dx, ResultOf<real> dw, ResultOf<real> du, ResultOf<real> dbias,
                           ResultOf<real> drest_bias, ResultOf<real> dunits, ResultOf<real> dstart,
                           ResultOf<real> dtarget) {
  RNN_INPUTS;
  residual* held = const_cast<residual*>(data<residual>(kept));
  return said([&] {
    const Outputs begins{nullptr, nullptr, nullptr, every ? carries(held) : nullptr, every};
    run_backward(pool, groups, s, in, data<stored>(y), held, begins,
                 {data<stored>(dy), data<stored>(dstates), data<real>(dlast)},
                 {data<stored>(dx), data<real>(dw), data<real>(du), data<real>(dbias), data<real>(drest_bias),
                  data<real>(dunits), data<real>(dstart), data<real>(dtarget)});
  });
}

inline auto bind() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Attr<bool>("time_major")
      .Attr<int64_t>("groups")
      .Attr<int64_t>("every")
      .Attr<ffi::Span<const int64_t>>("zoneout");
}

template <class Bound>
auto with_inputs(Bound&& bound) {
  return std::move(bound)
      .template Arg<Stack>()
      .template Arg<Array>()
      .template Arg<Array>()
      .template Arg<Array>()
      .template Arg<Array>()
      .template Arg<Array>()
      .template Arg<Array>()
      .template Arg<Array>()
      .template Arg<Array>()
      .template Arg<Integers>()
      .template Arg<Booleans>()
      .template Arg<Array>()
      .template Arg<Booleans>()
      .template Arg<Array>();
}

inline auto bind_forward() {
  return with_inputs(bind()).Ret<Stack>().Ret<Array>().Ret<Kept>().Ret<Stack>();
}

// The cotangents of the outputs come last, those of the inputs go in the order of these.
inline auto bind_backward() {
  return with_inputs(bind())
      .Arg<Stack>()
      .Arg<Kept>()
      .Arg<Stack>()
      .Arg<Array>()
      .Arg<Stack>()
      .Ret<Stack>()
      .Ret<Array>()
      .Ret<Array>()
      .Ret<Array>()
      .Ret<Array>()
      .Ret<Array>()
      .Ret<Array>()
      .Ret<Array>();
}

}  // namespace rnn

// All else is hidden: symbols of two cells that are loaded into one process have the same names.
#define RNN_VISIBLE extern "C" __attribute__((visibility("default")))
RNN_VISIBLE XLA_FFI_Error* rnn_forward(XLA_FFI_CallFrame*);
RNN_VISIBLE XLA_FFI_Error* rnn_forward_keeping(XLA_FFI_CallFrame*);
RNN_VISIBLE XLA_FFI_Error* rnn_backward(XLA_FFI_CallFrame*);

XLA_FFI_DEFINE_HANDLER_SYMBOL(rnn_forward, rnn::forward<false>, rnn::bind_forward());
XLA_FFI_DEFINE_HANDLER_SYMBOL(rnn_forward_keeping, rnn::forward<true>, rnn::bind_forward());
XLA_FFI_DEFINE_HANDLER_SYMBOL(rnn_backward, rnn::backward, rnn::bind_backward());
