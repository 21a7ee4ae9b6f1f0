// Memory for the words of masks that live as long as one op.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace unseg {

// Hands out rows of words one after the other from blocks, and takes back what a row did not need.
// Blocks of the usual size return to a pool of at most 16 MiB per process: fresh memory from the
// system costs more than packing masks into it.
class WordArena {
 public:
  WordArena() = default;
  WordArena(WordArena&& other) noexcept;
  WordArena(const WordArena&) = delete;
  WordArena& operator=(const WordArena&) = delete;
  ~WordArena();

  // Room for `words` words, aligned to 64 bytes. Throws std::bad_alloc.
  uint64_t* reserve(int64_t words);
  // Keeps the first `words` of what reserve() gave last.
  void commit(int64_t words) { used_ += words; }

 private:
  struct Block {
    uint64_t* data;
    int64_t words;
  };
  std::vector<Block> blocks_;
  int64_t used_ = 0;  // words of the last block
};

}  // namespace unseg
