// The two calls that XLA makes.  Arrays that there are none of come with no elements.
#pragma once

#include "runs.h"
#include "xla/ffi/api/ffi.h"

namespace rnn {

namespace ffi = xla::ffi;

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
using Rows = Of<residual>;       // what the derivative needs
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
  return Sizes(time_major ? xs[0] : xs[1], time_major ? xs[1] : xs[0], xs[2], ws[2], us.size() < 4 ? 1 : us[0],
               us.size() == 3 ? us[0] : 0, diagonal, time_major);
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

template <class Body>
ffi::Error said(Body&& body) {
  try {
    body();
    return ffi::Error::Success();
  } catch (const std::exception& error) {
    return ffi::Error::Internal(std::string("rnncore's C++ loop: ") + error.what());
  }
}

// The operands of all calls, in their order.
#define RNN_OPERANDS                                                                                               \
  ffi::ThreadPool pool, bool time_major, int64_t groups, int64_t every, bool again, ffi::Span<const int64_t> kinds, Stack x, \
      Array w, Array u, Array readouts, \
      Array bias, Array rest_bias, Array units, Array start, Array target, Array recurrent_mask, Integers lengths, \
      Booleans resets, Array share, Booleans chosen, Array shares
#define RNN_INPUTS                                                                                           \
  const Sizes s = sizes_of(x, w, u, time_major);                                                             \
  const Inputs in {                                                                                          \
    data<stored>(x), data<real>(w), data<real>(u), data<real>(readouts), data<real>(bias), data<real>(rest_bias), data<real>(units), \
        data<real>(start), data<real>(target), data<real>(recurrent_mask), data<int32_t>(lengths),           \
        data<bool>(resets), zoneout_of(s, kinds, share, chosen, shares)                                      \
  }

// What a derivative needs is `kept`, and of every so many steps the carry; or the carry of all fields alone, and stretches
// are run again.
template <bool Keep>
ffi::Error forward(RNN_OPERANDS, ResultOf<stored> y, ResultOf<real> last, ResultOf<residual> kept,
                   ResultOf<real> begins, ResultOf<stored> states) {
  RNN_INPUTS;
  const Outputs out{data<stored>(y), data<stored>(states), data<real>(last), {data<real>(begins), every, again}};
  return said([&] {
    if (Keep && again) return run_forward<false>(pool, s, in, out, nullptr);
    run_forward<Keep>(pool, s, in, out, data<residual>(kept));
  });
}

inline ffi::Error backward(RNN_OPERANDS, Stack y, Rows kept, Array begins, Stack dy, Array dlast,
                           Stack dstates,
                           ResultOf<stored> dx, ResultOf<real> dw, ResultOf<real> du, ResultOf<real> dreadouts, ResultOf<real> dbias,
                           ResultOf<real> drest_bias, ResultOf<real> dunits, ResultOf<real> dstart,
                           ResultOf<real> dtarget) {
  RNN_INPUTS;
  residual* held = const_cast<residual*>(data<residual>(kept));
  real* carries = const_cast<real*>(data<real>(begins));
  return said([&] {
    run_backward(pool, groups, s, in, data<stored>(y), held, {carries, every, again},
                 {data<stored>(dy), data<stored>(dstates), data<real>(dlast)},
                 {data<stored>(dx), data<real>(dw), data<real>(du), data<real>(dreadouts), data<real>(dbias), data<real>(drest_bias),
                  data<real>(dunits), data<real>(dstart), data<real>(dtarget)});
  });
}

inline auto bind() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Attr<bool>("time_major")
      .Attr<int64_t>("groups")
      .Attr<int64_t>("every")
      .Attr<bool>("again")
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
      .template Arg<Array>()
      .template Arg<Integers>()
      .template Arg<Booleans>()
      .template Arg<Array>()
      .template Arg<Booleans>()
      .template Arg<Array>();
}

inline auto bind_forward() {
  return with_inputs(bind()).Ret<Stack>().Ret<Array>().Ret<Rows>().Ret<Array>().Ret<Stack>();
}

// The cotangents of the outputs come last, those of the inputs go in the order of these.
inline auto bind_backward() {
  return with_inputs(bind())
      .Arg<Stack>()
      .Arg<Rows>()
      .Arg<Array>()
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
