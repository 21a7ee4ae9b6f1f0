#include "word_arena.h"

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>
#include <utility>

namespace unseg {
namespace {

constexpr int64_t kBlockWords = 1 << 15;  // 256 KiB
constexpr size_t kMostPooled = 64;
constexpr int64_t kRowsPerBlock = 8;  // of rows too long for the usual block

// Unused blocks of kBlockWords.
struct Pool {
  std::mutex mutex;
  std::vector<uint64_t*> blocks;
};

Pool& pool() {
  static Pool* const instance = new Pool;  // never destroyed: ops may still run at exit
  return *instance;
}

uint64_t* allocate(int64_t words) {
  if (words == kBlockWords) {
    const std::lock_guard<std::mutex> lock(pool().mutex);
    if (!pool().blocks.empty()) {
      uint64_t* block = pool().blocks.back();
      pool().blocks.pop_back();
      return block;
    }
  }
  void* block = std::aligned_alloc(64, static_cast<size_t>(words) * sizeof(uint64_t));
  if (block == nullptr) throw std::bad_alloc();
  return static_cast<uint64_t*>(block);
}

void release(uint64_t* block, int64_t words) {
  if (words == kBlockWords) {
    const std::lock_guard<std::mutex> lock(pool().mutex);
    if (pool().blocks.size() < kMostPooled) {
      pool().blocks.push_back(block);
      return;
    }
  }
  std::free(block);
}

}  // namespace

WordArena::WordArena(WordArena&& other) noexcept
    : blocks_(std::move(other.blocks_)), used_(other.used_) {
  other.blocks_.clear();
}

WordArena::~WordArena() {
  for (const Block& block : blocks_) release(block.data, block.words);
}

uint64_t* WordArena::reserve(int64_t words) {
  if (blocks_.empty() || used_ + words > blocks_.back().words) {
    const int64_t size = words > kBlockWords / 2 ? words * kRowsPerBlock : kBlockWords;
    blocks_.push_back({allocate(size), size});
    used_ = 0;
  }
  return blocks_.back().data + used_;
}

}  // namespace unseg
