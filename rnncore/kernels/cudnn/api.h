// What is used of cuDNN's interface for recurrent networks (version 9), declared here and found in the library when it
// is loaded: nothing is linked, and neither cuDNN's headers nor CUDA's are needed.
#pragma once

#include <dlfcn.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace cudnn {

using Status = int;
using Handle = struct HandleStruct*;
using Context = struct ContextStruct*;
using Stream = struct StreamStruct*;
using Dropout = struct DropoutStruct*;
using Rnn = struct RnnStruct*;
using RnnData = struct RnnDataStruct*;
using Tensor = struct TensorStruct*;

enum DataType { kFloat = 0, kHalf = 2, kBfloat16 = 9 };
enum { kDoubleBias = 2, kLinearInput = 0, kSequenceMajorUnpacked = 0, kPaddedIo = 1, kAddGradients = 0 };
enum ForwardMode { kInference = 0, kTraining = 1 };
enum { kAllocationFailed = 4004 };

struct Library {
  void* file = nullptr;
  void* driver = nullptr;

#define RNN_CUDNN_FUNCTIONS(X)                                                                                        \
  X(const char*, cudnnGetErrorString, (Status))                                                                       \
  X(size_t, cudnnGetVersion, ())                                                                                      \
  X(Status, cudnnCreate, (Handle*))                                                                                   \
  X(Status, cudnnSetStream, (Handle, Stream))                                                                         \
  X(Status, cudnnCreateDropoutDescriptor, (Dropout*))                                                                 \
  X(Status, cudnnSetDropoutDescriptor, (Dropout, Handle, float, void*, size_t, unsigned long long))                   \
  X(Status, cudnnCreateTensorDescriptor, (Tensor*))                                                                   \
  X(Status, cudnnDestroyTensorDescriptor, (Tensor))                                                                   \
  X(Status, cudnnSetTensorNdDescriptor, (Tensor, int, int, const int*, const int*))                                   \
  X(Status, cudnnGetTensorNdDescriptor, (Tensor, int, int*, int*, int*, int*))                                        \
  X(Status, cudnnCreateRNNDescriptor, (Rnn*))                                                                         \
  X(Status, cudnnDestroyRNNDescriptor, (Rnn))                                                                         \
  X(Status, cudnnSetRNNDescriptor_v8,                                                                                 \
    (Rnn, int algorithm, int mode, int bias, int direction, int input, int data, int arithmetic, int math,            \
     int32_t inputs, int32_t hidden, int32_t projected, int32_t layers, Dropout, uint32_t flags))                     \
  X(Status, cudnnCreateRNNDataDescriptor, (RnnData*))                                                                 \
  X(Status, cudnnDestroyRNNDataDescriptor, (RnnData))                                                                 \
  X(Status, cudnnSetRNNDataDescriptor,                                                                                \
    (RnnData, int data, int layout, int steps, int batch, int size, const int* lengths, void* fill))                  \
  X(Status, cudnnGetRNNWeightSpaceSize, (Handle, Rnn, size_t*))                                                       \
  X(Status, cudnnGetRNNTempSpaceSizes, (Handle, Rnn, int mode, RnnData, size_t* work, size_t* reserve))               \
  X(Status, cudnnGetRNNWeightParams,                                                                                  \
    (Handle, Rnn, int32_t layer, size_t, const void* weights, int32_t gate, Tensor, void**, Tensor, void**))          \
  X(Status, cudnnRNNForward,                                                                                          \
    (Handle, Rnn, int mode, const int32_t* lengths, RnnData, const void* x, RnnData, void* y, Tensor, const void* h,  \
     void* last_h, Tensor, const void* c, void* last_c, size_t, const void* weights, size_t, void* work, size_t,      \
     void* reserve))                                                                                                  \
  X(Status, cudnnRNNBackwardData_v8,                                                                                  \
    (Handle, Rnn, const int32_t* lengths, RnnData, const void* y, const void* dy, RnnData, void* dx, Tensor,          \
     const void* h, const void* dlast_h, void* dh, Tensor, const void* c, const void* dlast_c, void* dc, size_t,      \
     const void* weights, size_t, void* work, size_t, void* reserve))                                                 \
  X(Status, cudnnRNNBackwardWeights_v8,                                                                               \
    (Handle, Rnn, int add, const int32_t* lengths, RnnData, const void* x, Tensor, const void* h, RnnData,            \
     const void* y, size_t, void* dweights, size_t, void* work, size_t, void* reserve))

// Of CUDA's driver: which GPU a call is for, and lengths to the host.
#define RNN_CUDA_FUNCTIONS(X)                                                       \
  X(int, cuDeviceGet, (int*, int ordinal))                                          \
  X(int, cuDevicePrimaryCtxRetain, (Context*, int))                                 \
  X(int, cuCtxPushCurrent_v2, (Context))                                            \
  X(int, cuCtxPopCurrent_v2, (Context*))                                            \
  X(int, cuCtxGetCurrent, (Context*))                                               \
  X(int, cuMemcpyDtoHAsync_v2, (void* to, unsigned long long from, size_t, Stream)) \
  X(int, cuStreamSynchronize, (Stream))

#define RNN_DECLARE(result, name, arguments) result(*name) arguments = nullptr;
  RNN_CUDNN_FUNCTIONS(RNN_DECLARE)
  RNN_CUDA_FUNCTIONS(RNN_DECLARE)
#undef RNN_DECLARE

  template <class F>
  static void find(F& function, void* file, const char* name) {
    function = reinterpret_cast<F>(dlsym(file, name));
    if (!function) throw std::runtime_error(std::string("no function ") + name);
  }

  // path: of the library, or its bare name where the process has loaded it or the system finds it.
  void load(const char* path) {
    if (file) return;
    void* opened = dlopen(path, RTLD_LAZY | RTLD_LOCAL);
    if (!opened) throw std::runtime_error(dlerror());
#define RNN_FIND(result, name, arguments) find(name, opened, #name);
    RNN_CUDNN_FUNCTIONS(RNN_FIND)
#undef RNN_FIND
    driver = dlsym(opened, "cuStreamSynchronize") ? opened : dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL);
    if (!driver) throw std::runtime_error(dlerror());
#define RNN_FIND(result, name, arguments) find(name, driver, #name);
    RNN_CUDA_FUNCTIONS(RNN_FIND)
#undef RNN_FIND
    file = opened;
  }
};

inline Library library;

inline void check(Status status, const char* call) {
  if (status == 0) return;
  throw std::runtime_error(std::string(call) + ": " + library.cudnnGetErrorString(status) + " (" +
                           std::to_string(status) + ")");
}

inline void check_cuda(int status, const char* call) {
  if (status) throw std::runtime_error(std::string(call) + ": CUDA error " + std::to_string(status));
}

#define RNN_CUDNN(name, ...) ::cudnn::check(::cudnn::library.name(__VA_ARGS__), #name)
#define RNN_CUDA(name, ...) ::cudnn::check_cuda(::cudnn::library.name(__VA_ARGS__), #name)

}  // namespace cudnn
