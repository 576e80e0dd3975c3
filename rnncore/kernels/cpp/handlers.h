// The calls that XLA makes.  Arrays that there are none of come with no elements.
#pragma once

#include "runs.h"
#include "xla/ffi/api/ffi.h"

namespace rnn {

namespace ffi = xla::ffi;

// The arrays of a call, one after the other, in the types that calls.py gives them; null for none.
class Arrays {
 public:
  Arrays(ffi::RemainingArgs operands, ffi::RemainingRets results) : operands_(operands), results_(results) {}
  ffi::AnyBuffer operand(size_t n) const { return operands_.get<ffi::AnyBuffer>(n).value(); }
  template <class T>
  T* next() {
    return data<T>(operand(operand_++));
  }
  template <class T>
  T* next_result() {
    return data<T>(*results_.get<ffi::AnyBuffer>(result_++).value());
  }

 private:
  // bfloat16 and float16 lie in memory as XLA's do, under names of their own.
  template <class T>
  static T* data(const ffi::AnyBuffer& a) {
    return a.element_count() ? reinterpret_cast<T*>(a.untyped_data()) : nullptr;
  }
  ffi::RemainingArgs operands_;
  ffi::RemainingRets results_;
  size_t operand_ = 0, result_ = 0;
};

inline Sizes sizes_of(const Arrays& arrays, bool time_major) {
  auto xs = arrays.operand(0).dimensions(), ws = arrays.operand(1).dimensions(), us = arrays.operand(2).dimensions();
  const bool diagonal = us.size() == 2;
  return Sizes(time_major ? xs[0] : xs[1], time_major ? xs[1] : xs[0], xs[2], ws[2], us.size() < 4 ? 1 : us[0],
               us.size() == 3 ? us[0] : 0, diagonal, time_major);
}

// `kinds` of all fields; their shares for all steps, booleans and shares (T, B, H) one after the other.
inline Zoneout zoneout_of(const Sizes& s, ffi::Span<const int64_t> kinds, Arrays& arrays) {
  Zoneout all;
  const real* share = arrays.next<real>();
  const bool* chosen = arrays.next<bool>();
  const real* shares = arrays.next<real>();
  const int64_t apart = s.steps * s.batch * s.hidden;
  for (int f = 0; f < Cell::fields && size_t(f) < kinds.size(); f++) {
    all.kinds[f] = Zoneout::Kind(kinds[f]);
    all.any |= kinds[f] != Zoneout::kNone;
    if (kinds[f] == Zoneout::kShare) all.share[f] = share[f];
    if (kinds[f] == Zoneout::kChosen) all.chosen[f] = chosen, chosen += apart;
    if (kinds[f] == Zoneout::kShares) all.shares[f] = shares, shares += apart;
  }
  return all;
}

// In the order of the fields of `Inputs`.
inline Inputs inputs_of(const Sizes& s, ffi::Span<const int64_t> kinds, Arrays& arrays) {
  Inputs in = {arrays.next<stored>()};
  for (const real** one : {&in.w, &in.u, &in.readouts, &in.bias, &in.rest_bias, &in.units, &in.start, &in.target,
                           &in.recurrent_mask})
    *one = arrays.next<real>();
  in.lengths = arrays.next<int32_t>(), in.resets = arrays.next<bool>(), in.zoneout = zoneout_of(s, kinds, arrays);
  return in;
}

enum Call { kForward, kForwardKeeping, kBackward };

template <Call Which>
ffi::Error call(ffi::ThreadPool pool, bool time_major, int64_t groups, int64_t every, bool again,
                ffi::Span<const int64_t> kinds, ffi::RemainingArgs operands, ffi::RemainingRets results) {
  try {
    Arrays arrays(operands, results);
    const Sizes s = sizes_of(arrays, time_major);
    const Inputs in = inputs_of(s, kinds, arrays);
    if constexpr (Which == kBackward) {
      const stored* y = arrays.next<stored>();
      residual* kept = arrays.next<residual>();
      const Begins begins = {arrays.next<real>(), every, again};
      Cotangents given;
      given.y = arrays.next<stored>(), given.last = arrays.next<real>(), given.states = arrays.next<stored>();
      Gradients out = {arrays.next_result<stored>()};
      for (real** one : {&out.w, &out.u, &out.readouts, &out.bias, &out.rest_bias, &out.units, &out.start, &out.target})
        *one = arrays.next_result<real>();
      run_backward(pool, groups, s, in, y, kept, begins, given, out);
    } else {
      Outputs out;
      out.y = arrays.next_result<stored>(), out.last = arrays.next_result<real>();
      residual* kept = arrays.next_result<residual>();
      out.begins = {arrays.next_result<real>(), every, again}, out.states = arrays.next_result<stored>();
      // What a derivative needs is `kept`, and of every so many steps the carry; or the carry of all fields alone, and
      // stretches are run again.
      constexpr bool kKeep = Which == kForwardKeeping;
      if (kKeep && again)
        run_forward<false>(pool, s, in, out, nullptr);
      else
        run_forward<kKeep>(pool, s, in, out, kept);
    }
    return ffi::Error::Success();
  } catch (const std::exception& error) {
    return ffi::Error::Internal(std::string("rnncore's C++ loop: ") + error.what());
  }
}

inline auto binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Attr<bool>("time_major")
      .Attr<int64_t>("groups")
      .Attr<int64_t>("every")
      .Attr<bool>("again")
      .Attr<ffi::Span<const int64_t>>("zoneout")
      .RemainingArgs()
      .RemainingRets();
}

}  // namespace rnn

// All else is hidden: symbols of two cells that are loaded into one process have the same names.
#define RNN_VISIBLE extern "C" __attribute__((visibility("default")))
RNN_VISIBLE XLA_FFI_Error* rnn_forward(XLA_FFI_CallFrame*);
RNN_VISIBLE XLA_FFI_Error* rnn_forward_keeping(XLA_FFI_CallFrame*);
RNN_VISIBLE XLA_FFI_Error* rnn_backward(XLA_FFI_CallFrame*);

XLA_FFI_DEFINE_HANDLER_SYMBOL(rnn_forward, rnn::call<rnn::kForward>, rnn::binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(rnn_forward_keeping, rnn::call<rnn::kForwardKeeping>, rnn::binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(rnn_backward, rnn::call<rnn::kBackward>, rnn::binding());
