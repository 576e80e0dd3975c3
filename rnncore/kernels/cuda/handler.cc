// The call that XLA makes for every kernel: fills what has to be filled, and launches.  The driver's interface is found
// in the process, so that this is compiled without CUDA.
#include <dlfcn.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace rnn {

using Stream = struct CUstream_st*;
constexpr int kTooLarge = 720;  // CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE
constexpr int kDynamicSharedMemory = 8;  // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES

// CUlaunchAttribute and CUlaunchConfig of cuda.h
struct Attribute {
  int id;
  char pad[4];
  union {
    char room[64];
    struct {
      unsigned x, y, z;
    } cluster;
    int cooperative;
  };
};
struct Launch {
  unsigned grid[3], block[3], shared;
  Stream stream;
  Attribute* attributes;
  unsigned count;
};
constexpr int kCooperative = 2, kClusterDimension = 4;    // CUlaunchAttributeID
constexpr int kNonPortableCluster = 14;  // CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED

struct Driver {
  int (*library)(void**, const void*, void*, void*, unsigned, void*, void*, unsigned) = nullptr;
  int (*kernel)(void**, void*, const char*) = nullptr;
  int (*device)(int*) = nullptr;
  int (*attribute)(int, int, void*, int) = nullptr;
  int (*capture_mode)(int*) = nullptr;
  int (*fill)(unsigned long long, unsigned char, size_t, Stream) = nullptr;
  int (*launch)(const Launch*, void*, void**, void**) = nullptr;
  int (*words)(int, const char**) = nullptr;
  std::string missing;

  Driver() {
    void* const driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
    find(driver, library, "cuLibraryLoadData"), find(driver, kernel, "cuLibraryGetKernel");
    find(driver, device, "cuCtxGetDevice"), find(driver, attribute, "cuKernelSetAttribute");
    find(driver, capture_mode, "cuThreadExchangeStreamCaptureMode"), find(driver, fill, "cuMemsetD8Async");
    find(driver, launch, "cuLaunchKernelEx"), find(driver, words, "cuGetErrorString");
  }
  template <class F>
  void find(void* driver, F& f, const char* name) {
    f = driver ? reinterpret_cast<F>(dlsym(driver, name)) : nullptr;
    if (!f) missing = name;
  }
  // `together`: all blocks run at once, or it is an error; the blocks of a cluster do in any case.
  int start(void* kernel, unsigned blocks, unsigned threads, unsigned shared, unsigned cluster, bool together,
            Stream stream, void** parameters) const {
    Attribute attributes[2] = {};
    unsigned count = 0;
    if (together) attributes[count].id = kCooperative, attributes[count++].cooperative = 1;
    if (cluster > 1) attributes[count].id = kClusterDimension, attributes[count++].cluster = {cluster, 1, 1};
    const Launch launch = {{blocks, 1, 1}, {threads, 1, 1}, shared, stream, attributes, count};
    return this->launch(&launch, kernel, parameters, nullptr);
  }
  std::string said(int code) const {
    const char* text = nullptr;
    words(code, &text);
    return text ? text : std::to_string(code);
  }
};

// The kernel of a compiled file, loaded once in a process, its shared memory allowed once on a device.
class Kernels {
 public:
  int find(const Driver& driver, std::string_view key, ffi::Span<const uint8_t> code, const char* name, int shared,
           int cluster, void** found) {
    std::lock_guard<std::mutex> lock(mutex_);
    // While somebody records a graph, loading is allowed in this mode only.
    int mode = 2;
    driver.capture_mode(&mode);
    const int result = load(driver, std::string(key), code, name, shared, cluster, found);
    driver.capture_mode(&mode);
    return result;
  }

 private:
  int load(const Driver& driver, const std::string& key, ffi::Span<const uint8_t> code, const char* name, int shared,
           int cluster, void** found) {
    void*& kernel = kernels_[key];
    if (!kernel) {
      void* library = nullptr;
      const std::string text(reinterpret_cast<const char*>(code.begin()), code.size());  // PTX ends with a zero
      if (int bad = driver.library(&library, text.c_str(), nullptr, nullptr, 0, nullptr, nullptr, 0)) return bad;
      if (int bad = driver.kernel(&kernel, library, name)) return kernel = nullptr, bad;
    }
    int device = 0;
    if (int bad = driver.device(&device)) return bad;
    bool& allowed = allowed_[{key, device}];
    if (!allowed) {
      if (int bad = driver.attribute(kDynamicSharedMemory, shared, kernel, device)) return bad;
      if (cluster > 8)
        if (int bad = driver.attribute(kNonPortableCluster, 1, kernel, device)) return bad;
    }
    allowed = true, *found = kernel;
    return 0;
  }
  std::mutex mutex_;
  std::map<std::string, void*> kernels_;
  std::map<std::pair<std::string, int>, bool> allowed_;
};

ffi::Error run(Stream stream, ffi::Span<const uint8_t> code, std::string_view key, std::string_view name, int64_t blocks,
               int64_t threads, int64_t shared, int64_t cluster, bool together, int64_t filled, ffi::Span<const int64_t> scalars,
               ffi::RemainingArgs arguments, ffi::RemainingRets results) {
  static const Driver driver;
  static Kernels kernels;
  auto failed = [&](const std::string& what) { return ffi::Error::Internal("rnncore's CUDA loop: " + what); };
  if (!driver.missing.empty()) return failed("the driver has no " + driver.missing + "; it takes one for CUDA 12 or newer");
  void* kernel = nullptr;
  if (int bad = kernels.find(driver, key, code, std::string(name).c_str(), int(shared), int(cluster), &kernel))
    return failed("the kernel cannot be loaded: " + driver.said(bad));
  std::vector<uint64_t> words;
  for (size_t n = 0; n < arguments.size(); n++) {
    auto array = arguments.get<ffi::AnyBuffer>(n);
    if (!array) return array.error();
    words.push_back(array->element_count() ? reinterpret_cast<uint64_t>(array->untyped_data()) : 0);
  }
  for (size_t n = 0; n < results.size(); n++) {
    auto array = results.get<ffi::AnyBuffer>(n);
    if (!array) return array.error();
    const uint64_t place = (*array)->element_count() ? reinterpret_cast<uint64_t>((*array)->untyped_data()) : 0;
    words.push_back(place);
    if (place && filled >> n & 1)
      if (int bad = driver.fill(place, 0xff, (*array)->size_bytes(), stream)) return failed(driver.said(bad));
  }
  words.insert(words.end(), scalars.begin(), scalars.end());
  void* parameters[] = {words.data()};
  const int bad = driver.start(kernel, unsigned(blocks), unsigned(threads), unsigned(shared), unsigned(cluster), together,
                               stream, parameters);
  if (bad == kTooLarge)
    return failed(std::to_string(blocks) + " blocks of " + std::to_string(threads) + " threads with " +
                  std::to_string(shared) + " bytes of shared memory wait for each other, and this GPU cannot run all of "
                  "them at once; give it fewer sequences at a time, or use backend='scan'");
  return bad ? failed(driver.said(bad)) : ffi::Error::Success();
}

}  // namespace rnn

#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(rnn_cuda, rnn::run,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<rnn::Stream>>()
                                  .Attr<ffi::Span<const uint8_t>>("code")
                                  .Attr<std::string_view>("key")
                                  .Attr<std::string_view>("name")
                                  .Attr<int64_t>("blocks")
                                  .Attr<int64_t>("threads")
                                  .Attr<int64_t>("shared")
                                  .Attr<int64_t>("cluster")
                                  .Attr<bool>("together")
                                  .Attr<int64_t>("filled")
                                  .Attr<ffi::Span<const int64_t>>("scalars")
                                  .RemainingArgs()
                                  .RemainingRets(),
                              {ffi::Traits::kCmdBufferCompatible});
#pragma GCC visibility pop
