// What cuDNN is told about a run: descriptors, made once for each kind of run and kept.
#pragma once

#include <array>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "api.h"

namespace cudnn {

// The numbers are cuDNN's own but for `directions`; they come from Python in this order.
struct Kind {
  int64_t mode, algorithm, math, data, directions, layers, steps, batch, inputs, hidden;

  static constexpr int kNumbers = 10;
  std::array<int64_t, kNumbers> key() const {
    return {mode, algorithm, math, data, directions, layers, steps, batch, inputs, hidden};
  }
  bool has_cell_state() const { return mode == 2; }
  int gates() const { return mode == 2 ? 4 : mode == 3 ? 3 : 1; }
};

class Plan {
 public:
  Rnn rnn = nullptr;
  RnnData x = nullptr, y = nullptr;
  Tensor carry = nullptr;

  Plan(Handle handle, Dropout dropout, const Kind& kind, const int32_t* lengths) {
    RNN_CUDNN(cudnnCreateRNNDescriptor, &rnn);
    RNN_CUDNN(cudnnSetRNNDescriptor_v8, rnn, kind.algorithm, kind.mode, kDoubleBias, kind.directions - 1, kLinearInput,
              kind.data, kFloat, kind.math, kind.inputs, kind.hidden, kind.hidden, kind.layers, dropout, kPaddedIo);
    std::vector<int32_t> full(kind.batch, kind.steps);
    lengths_ = lengths ? std::vector<int32_t>(lengths, lengths + kind.batch) : full;
    set(&x, kind, kind.inputs);
    set(&y, kind, kind.directions * kind.hidden);
    const int dims[] = {int(kind.layers * kind.directions), int(kind.batch), int(kind.hidden)};
    const int strides[] = {dims[1] * dims[2], dims[2], 1};
    RNN_CUDNN(cudnnCreateTensorDescriptor, &carry);
    RNN_CUDNN(cudnnSetTensorNdDescriptor, carry, kind.data, 3, dims, strides);
    RNN_CUDNN(cudnnGetRNNWeightSpaceSize, handle, rnn, &weights);
  }

  Plan(const Plan&) = delete;

  ~Plan() {
    if (rnn) library.cudnnDestroyRNNDescriptor(rnn);
    if (x) library.cudnnDestroyRNNDataDescriptor(x);
    if (y) library.cudnnDestroyRNNDataDescriptor(y);
    if (carry) library.cudnnDestroyTensorDescriptor(carry);
  }

  size_t weights = 0;  // bytes

 private:
  void set(RnnData* data, const Kind& kind, int64_t size) {
    RNN_CUDNN(cudnnCreateRNNDataDescriptor, data);
    RNN_CUDNN(cudnnSetRNNDataDescriptor, *data, kind.data, kSequenceMajorUnpacked, kind.steps, kind.batch, size,
              lengths_.data(), &fill_);
  }

  std::vector<int32_t> lengths_;
  double fill_ = 0;  // of outputs past the length: zeros in every format
};

// A handle of cuDNN for one GPU, with the plans of the runs whose lengths are full.  They live as long as the process: a
// CUDA graph that was captured from them may hold their addresses.
class Session {
 public:
  Session() {
    const Status status = library.cudnnCreate(&handle);
    // JAX takes three quarters of a GPU's memory at its start.
    check(status, status == kAllocationFailed ? "cudnnCreate, for which JAX has left too little of the GPU's memory "
                                                "(lower XLA_PYTHON_CLIENT_MEM_FRACTION)"
                                              : "cudnnCreate");
    RNN_CUDNN(cudnnCreateDropoutDescriptor, &dropout);
    RNN_CUDNN(cudnnSetDropoutDescriptor, dropout, handle, 0.0f, nullptr, 0, 0);
  }

  const Plan& full(const Kind& kind) {
    auto& plan = plans_[kind.key()];
    if (!plan) plan = std::make_unique<Plan>(handle, dropout, kind, nullptr);
    return *plan;
  }

  // Of the GPU that is the calling thread's; made here if need be, which takes memory of the GPU and so cannot be while
  // a graph is captured.
  static Session& current() {
    Context context = nullptr;
    RNN_CUDA(cuCtxGetCurrent, &context);
    static std::mutex all;
    static auto& sessions = *new std::map<Context, std::unique_ptr<Session>>;  // never destroyed: CUDA may end first
    const std::lock_guard<std::mutex> lock(all);
    auto& session = sessions[context];
    if (!session) session = std::make_unique<Session>();
    return *session;
  }

  std::mutex mutex;
  Handle handle = nullptr;
  Dropout dropout = nullptr;

 private:
  std::map<std::array<int64_t, Kind::kNumbers>, std::unique_ptr<Plan>> plans_;
};

// One of the GPUs as the calling thread's own.
class OnDevice {
 public:
  explicit OnDevice(int ordinal) {
    int device;
    Context context;
    RNN_CUDA(cuDeviceGet, &device, ordinal);
    RNN_CUDA(cuDevicePrimaryCtxRetain, &context, device);  // for good: JAX's own is the same
    RNN_CUDA(cuCtxPushCurrent_v2, context);
  }
  OnDevice(const OnDevice&) = delete;
  ~OnDevice() {
    Context context;
    library.cuCtxPopCurrent_v2(&context);
  }
};

}  // namespace cudnn
