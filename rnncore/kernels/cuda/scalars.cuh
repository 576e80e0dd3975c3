// The functions that a cell's update may call, on one number.
#pragma once

namespace rnn {

using vec = float;
using mask = bool;
using bits = u32;

RNN_DEVICE vec select(mask m, vec yes, vec no) { return m ? yes : no; }
RNN_DEVICE mask select(mask m, mask yes, mask no) { return m ? yes : no; }
RNN_DEVICE vec numbers(mask m) { return m ? 1.f : 0.f; }
RNN_DEVICE vec larger(vec a, vec b) { return a > b || a != a ? a : b; }  // NaN stays
RNN_DEVICE vec smaller(vec a, vec b) { return a < b || a != a ? a : b; }
RNN_DEVICE vec signum(vec x) { return x > 0 ? 1.f : x < 0 ? -1.f : x; }

template <int N>
RNN_DEVICE vec power(vec x) {
  if constexpr (N < 0)
    return 1 / power<-N>(x);
  else if constexpr (N == 0)
    return 1;
  else if constexpr (N == 1)
    return x;
  else
    return N % 2 ? x * power<N / 2>(x * x) : power<N / 2>(x * x);
}

#if RNN_FAST  // where h is rounded to 16 bits: the GPU's own tanh, with an error below 2^-10.9
RNN_DEVICE vec hyperbolic_tangent(vec x) { return fast_tanh(x); }
RNN_DEVICE vec logistic(vec x) { return 0.5f * fast_tanh(0.5f * x) + 0.5f; }
RNN_DEVICE vec exponential(vec x) { return fast_exp(x); }
#else
RNN_DEVICE vec hyperbolic_tangent(vec x) { return tanhf(x); }
RNN_DEVICE vec logistic(vec x) { return fast_divide(1.f, 1.f + fast_exp(-x)); }
RNN_DEVICE vec exponential(vec x) { return expf(x); }
#endif

}  // namespace rnn
