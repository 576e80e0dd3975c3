// Memory: large pages for arrays that are new, and working memory.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <memory>
#include <mutex>
#include <vector>

#include "sizes.h"

namespace rnn {

// Asks for large pages where an array is about to be written for the first time: fresh memory comes page by page.
// `all` are the bytes of all such arrays: for many of them the kernel has to move other memory until it finds large
// pages in one piece, which takes longer than they save.
inline void expect_writing(void* data, size_t bytes, size_t all) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096;
  constexpr size_t kLeast = size_t(4) << 20, kMost = size_t(128) << 20;
  const uintptr_t from = rounded(reinterpret_cast<uintptr_t>(data), kPage);
  if (bytes >= kLeast && all <= kMost)
    madvise(reinterpret_cast<void*>(from), (bytes - kPage) / kPage * kPage, MADV_HUGEPAGE);
#endif
}

// Working memory of a call, kept for the next one.
class Memory {
 public:
  Memory() {
    std::lock_guard<std::mutex> lock(mutex());
    if (!idle().empty()) block_ = std::move(idle().back()), idle().pop_back();
  }
  ~Memory() {
    constexpr size_t kMost = size_t(128) << 20;
    std::lock_guard<std::mutex> lock(mutex());
    if (block_.bytes && block_.bytes <= kMost && idle().size() < 4) idle().push_back(std::move(block_));
  }
  // `count` numbers for each size, one after the other, not set to anything.
  std::vector<real*> parts(const std::vector<int64_t>& sizes) {
    constexpr int64_t kLine = 64 / sizeof(real);
    int64_t total = 0;
    for (int64_t n : sizes) total += rounded(n, kLine) + kLine;
    if (block_.bytes < total * sizeof(real)) block_ = Block(total * sizeof(real));
    std::vector<real*> out;
    real* at = static_cast<real*>(block_.data());
    for (int64_t n : sizes) out.push_back(at), at += rounded(n, kLine) + kLine;
    return out;
  }

 private:
  struct Block {
    Block() = default;
    explicit Block(size_t wanted) : bytes(wanted), owner(::operator new(wanted + kAlign), Free{}) {}
    void* data() const { return reinterpret_cast<void*>(rounded(reinterpret_cast<uintptr_t>(owner.get()), kAlign)); }
    static constexpr size_t kAlign = 64;
    struct Free {
      void operator()(void* p) const { ::operator delete(p); }
    };
    size_t bytes = 0;
    std::unique_ptr<void, Free> owner;
  };
  static std::mutex& mutex() {
    static std::mutex* one = new std::mutex;
    return *one;
  }
  static std::vector<Block>& idle() {
    static auto* all = new std::vector<Block>;
    return *all;
  }
  Block block_;
};

}  // namespace rnn
