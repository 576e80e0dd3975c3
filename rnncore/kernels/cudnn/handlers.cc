// The calls that XLA makes, forward and backward, and what Python asks the library before it traces them.
#include <cstring>

#include "plan.h"
#include "xla/ffi/api/ffi.h"

#ifdef RNN_CUDNN_ON_HOST  // in tests, with a library that computes on the CPU: there are no streams
struct StreamOfCall {};
template <>
struct xla::ffi::CtxDecoding<StreamOfCall> {
  using Type = cudnn::Stream;
  template <class Context>
  static std::optional<Type> Decode(const XLA_FFI_Api*, Context*, DiagnosticEngine&) {
    return nullptr;
  }
};
#else
using StreamOfCall = xla::ffi::PlatformStream<cudnn::Stream>;
#endif

namespace cudnn {

namespace ffi = xla::ffi;
using Array = ffi::AnyBuffer;

inline void* or_null(const Array& a) { return a.element_count() ? a.untyped_data() : nullptr; }

inline Kind kind_from(const int64_t* numbers) {
  Kind kind;
  static_assert(sizeof(Kind) == Kind::kNumbers * sizeof(int64_t));
  std::memcpy(&kind, numbers, sizeof(Kind));
  return kind;
}

// The plan of a call: the kept one where lengths are full, else one of its own, made of lengths read on the host.
class Call {
 public:
  Call(Stream stream, const Kind& kind, const Array& lengths) : session(Session::current()), lock_(session.mutex) {
    RNN_CUDNN(cudnnSetStream, session.handle, stream);
    if (!lengths.element_count()) {
      plan = &session.full(kind);
      return;
    }
    std::vector<int32_t> host(kind.batch);
    const auto from = reinterpret_cast<unsigned long long>(lengths.untyped_data());
    RNN_CUDA(cuMemcpyDtoHAsync_v2, host.data(), from, host.size() * sizeof(int32_t), stream);
    RNN_CUDA(cuStreamSynchronize, stream);
    own_ = std::make_unique<Plan>(session.handle, session.dropout, kind, host.data());
    plan = own_.get();
  }

  Session& session;
  const Plan* plan = nullptr;

 private:
  std::lock_guard<std::mutex> lock_;
  std::unique_ptr<Plan> own_;
};

// The arrays of a call, in the order that calls.py gives them.
struct Arrays {
  ffi::RemainingArgs operands;
  ffi::RemainingRets results;
  Array in(size_t n) const { return operands.get<Array>(n).value(); }
  Array out(size_t n) const { return *results.get<Array>(n).value(); }
};

template <class Body>
ffi::Error said(Body&& body) {
  try {
    body();
    return ffi::Error::Success();
  } catch (const std::exception& error) {
    return ffi::Error::Internal(std::string("rnncore's call of cuDNN: ") + error.what());
  }
}

// reserve: of no bytes where nothing is kept for a backward call.
ffi::Error forward(Stream stream, ffi::Span<const int64_t> kind, ffi::RemainingArgs operands,
                   ffi::RemainingRets results) {
  return said([&] {
    const Arrays arrays = {operands, results};
    const Array x = arrays.in(0), h = arrays.in(1), c = arrays.in(2), weights = arrays.in(3), lengths = arrays.in(4);
    const Array y = arrays.out(0), last_h = arrays.out(1), last_c = arrays.out(2), reserve = arrays.out(3),
                work = arrays.out(4);
    const Call call(stream, kind_from(kind.begin()), lengths);
    const Plan& plan = *call.plan;
    const bool keeps = reserve.element_count();
    RNN_CUDNN(cudnnRNNForward, call.session.handle, plan.rnn, keeps ? kTraining : kInference, nullptr, plan.x,
              x.untyped_data(), plan.y, y.untyped_data(), plan.carry, h.untyped_data(), last_h.untyped_data(),
              plan.carry, or_null(c), or_null(last_c), weights.size_bytes(), weights.untyped_data(),
              work.size_bytes(), work.untyped_data(), reserve.size_bytes(), or_null(reserve));
  });
}

// reserve and dweights stand in the memory of the operands: the library writes to the one what it needs in between, and
// adds to the zeros of the other, of which there are none where nobody wants these gradients.
ffi::Error backward(Stream stream, ffi::Span<const int64_t> kind, ffi::RemainingArgs operands,
                    ffi::RemainingRets results) {
  return said([&] {
    const Arrays arrays = {operands, results};
    const Array x = arrays.in(0), h = arrays.in(1), c = arrays.in(2), weights = arrays.in(3), lengths = arrays.in(4);
    const Array y = arrays.in(5), dy = arrays.in(6), dlast_h = arrays.in(7), dlast_c = arrays.in(8);
    const Array dx = arrays.out(0), dh = arrays.out(1), dc = arrays.out(2), reserve = arrays.out(3),
                dweights = arrays.out(4), work = arrays.out(5);
    const Call call(stream, kind_from(kind.begin()), lengths);
    const Plan& plan = *call.plan;
    const Handle handle = call.session.handle;
    RNN_CUDNN(cudnnRNNBackwardData_v8, handle, plan.rnn, nullptr, plan.y, y.untyped_data(), dy.untyped_data(), plan.x,
              dx.untyped_data(), plan.carry, h.untyped_data(), dlast_h.untyped_data(), dh.untyped_data(), plan.carry,
              or_null(c), or_null(dlast_c), or_null(dc), weights.size_bytes(), weights.untyped_data(),
              work.size_bytes(), work.untyped_data(), reserve.size_bytes(), reserve.untyped_data());
    if (!dweights.element_count()) return;
    RNN_CUDNN(cudnnRNNBackwardWeights_v8, handle, plan.rnn, kAddGradients, nullptr, plan.x, x.untyped_data(),
              plan.carry, h.untyped_data(), plan.y, y.untyped_data(), dweights.size_bytes(), dweights.untyped_data(),
              work.size_bytes(), work.untyped_data(), reserve.size_bytes(), reserve.untyped_data());
  });
}

inline auto binding() {
  return ffi::Ffi::Bind()
      .Ctx<StreamOfCall>()
      .Attr<ffi::Span<const int64_t>>("kind")
      .RemainingArgs()
      .RemainingRets();
}

// Writes the message where Python gave room for it; the status is 0 where all went well.
template <class Body>
int told(char* message, int64_t room, Body&& body) {
  try {
    body();
    return 0;
  } catch (const std::exception& error) {
    std::strncpy(message, error.what(), room - 1);
    message[room - 1] = 0;
    return 1;
  }
}

}  // namespace cudnn

#define RNN_VISIBLE extern "C" __attribute__((visibility("default")))

RNN_VISIBLE XLA_FFI_Error* rnn_forward(XLA_FFI_CallFrame*);
RNN_VISIBLE XLA_FFI_Error* rnn_backward(XLA_FFI_CallFrame*);
RNN_VISIBLE XLA_FFI_Error* rnn_forward_capturable(XLA_FFI_CallFrame*);
RNN_VISIBLE XLA_FFI_Error* rnn_backward_capturable(XLA_FFI_CallFrame*);

// Those with full lengths launch the same kernels at every call and wait for nothing: a CUDA graph may hold them.
#define RNN_CAPTURABLE {xla::ffi::Traits::kCmdBufferCompatible}
XLA_FFI_DEFINE_HANDLER_SYMBOL(rnn_forward, cudnn::forward, cudnn::binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(rnn_backward, cudnn::backward, cudnn::binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(rnn_forward_capturable, cudnn::forward, cudnn::binding(), RNN_CAPTURABLE);
XLA_FFI_DEFINE_HANDLER_SYMBOL(rnn_backward_capturable, cudnn::backward, cudnn::binding(), RNN_CAPTURABLE);

// Loads the library and makes a handle for each of the GPUs; version: of the library.
RNN_VISIBLE int rnn_load(const char* path, const int64_t* gpus, int64_t count, int64_t* version, char* message,
                         int64_t room) {
  return cudnn::told(message, room, [&] {
    cudnn::library.load(path);
    *version = cudnn::library.cudnnGetVersion();
    for (int64_t n = 0; n < count; n++) {
      const cudnn::OnDevice device(gpus[n]);
      cudnn::Session::current();
    }
  });
}

// sizes: bytes of the weights, of working memory without and with a backward pass to come, and of the reserve.
RNN_VISIBLE int rnn_sizes(int64_t gpu, const int64_t* numbers, int64_t* sizes, char* message, int64_t room) {
  return cudnn::told(message, room, [&] {
    using namespace cudnn;
    const OnDevice device(gpu);
    Session& session = Session::current();
    const std::lock_guard<std::mutex> lock(session.mutex);
    const Plan& plan = session.full(kind_from(numbers));
    size_t inference = 0, training = 0, reserve = 0;
    RNN_CUDNN(cudnnGetRNNTempSpaceSizes, session.handle, plan.rnn, kInference, plan.x, &inference, nullptr);
    RNN_CUDNN(cudnnGetRNNTempSpaceSizes, session.handle, plan.rnn, kTraining, plan.x, &training, &reserve);
    const size_t found[] = {plan.weights, inference, training, reserve};
    for (int n = 0; n < 4; n++) sizes[n] = found[n];
  });
}

// places: for each layer and direction, the gates' matrices of the inputs, of h, and then the biases of both: where each
// begins (in bytes) and how many rows and columns it has.
RNN_VISIBLE int rnn_places(int64_t gpu, const int64_t* numbers, int64_t* places, char* message,
                           int64_t room) {
  return cudnn::told(message, room, [&] {
    using namespace cudnn;
    const OnDevice device(gpu);
    Session& session = Session::current();
    const std::lock_guard<std::mutex> lock(session.mutex);
    const Kind kind = kind_from(numbers);
    const Plan& plan = session.full(kind);
    char* const base = reinterpret_cast<char*>(4096);  // only reckoned with
    Tensor matrix, bias;
    RNN_CUDNN(cudnnCreateTensorDescriptor, &matrix);
    RNN_CUDNN(cudnnCreateTensorDescriptor, &bias);
    const int gates = 2 * kind.gates();
    for (int layer = 0; layer < kind.layers * kind.directions; layer++, places += 2 * gates * 3) {
      for (int gate = 0; gate < gates; gate++) {
        void *matrix_at = nullptr, *bias_at = nullptr;
        RNN_CUDNN(cudnnGetRNNWeightParams, session.handle, plan.rnn, layer, plan.weights, base, gate, matrix,
                  &matrix_at, bias, &bias_at);
        const std::pair<Tensor, void*> both[] = {{matrix, matrix_at}, {bias, bias_at}};
        for (int n = 0; n < 2; n++) {
          int data, rank, dims[3] = {}, strides[3] = {};
          RNN_CUDNN(cudnnGetTensorNdDescriptor, both[n].first, 3, &data, &rank, dims, strides);
          int64_t* const place = places + (n * gates + gate) * 3;
          place[0] = both[n].second ? static_cast<char*>(both[n].second) - base : -1;
          place[1] = dims[1], place[2] = dims[2];
        }
      }
    }
    library.cudnnDestroyTensorDescriptor(matrix);
    library.cudnnDestroyTensorDescriptor(bias);
  });
}
