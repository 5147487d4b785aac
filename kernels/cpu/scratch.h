// Memory for large working values.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdlib>

#include "dispatch.h"

namespace ldmrt {
inline namespace LDMRT_LEVEL {

// Memory for working values that stays for the thread's next call: malloc would give large blocks back to the system, which fills
// them with zeros, page by page, when they are next touched. One at a time in a thread.
template <typename T>
class Scratch {
 public:
  explicit Scratch(std::int64_t count) : data_(static_cast<T*>(kept().least(static_cast<std::size_t>(count) * sizeof(T)))) {}
  T* data() { return data_; }

 private:
  class Kept {
   public:
    ~Kept() { std::free(data_); }
    void* least(std::size_t bytes) {
      if (bytes > bytes_) {
        std::free(data_);
        bytes_ = (bytes + kHugePage - 1) / kHugePage * kHugePage;
        data_ = std::aligned_alloc(kHugePage, bytes_);
        if (data_ == nullptr) bytes_ = 0, throw std::bad_alloc();
#if defined(__linux__)
        madvise(data_, bytes_, MADV_HUGEPAGE);
#endif
      }
      return data_;
    }

   private:
    static constexpr std::size_t kHugePage = std::size_t{2} << 20;
    void* data_ = nullptr;
    std::size_t bytes_ = 0;
  };
  static Kept& kept() {
    thread_local Kept memory;
    return memory;
  }
  T* data_;
};

}  // namespace LDMRT_LEVEL
}  // namespace ldmrt
