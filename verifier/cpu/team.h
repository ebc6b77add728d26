// Threads that share the work of one call. Whoever is free takes the next piece, so a thread that has no core, as another
// program runs there, is not waited for: the others do its part. Only a piece that it has begun is.
//
// Between two calls pass some microseconds, or those of Python, in which a thread waits awake; after a while it sleeps
// and leaves its core to others. (OpenMP's threads meet at barriers, and wait there awake: beside one busy program a step
// took four times as long in the median, and up to thirty times.)

#pragma once

#include <sched.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <thread>
#ifdef __x86_64__
#include <immintrin.h>
#endif

class Team {
 public:
  // Calls work(piece) for each piece in [0, count), on this thread and up to `num_threads` - 1 others.
  template <typename Work>
  void run(int64_t count, int num_threads, const Work& work) {
    if (count <= 0) return;
    std::unique_lock<std::mutex> turn(turn_, std::defer_lock);
    if (count == 1 || num_threads <= 1 || count > kMost || !turn.try_lock()) {  // or somebody else has the others
      for (int64_t piece = 0; piece < count; piece++) work(piece);
      return;
    }
    hire(num_threads - 1);
    work_ = &work;
    call_ = [](const void* held, int64_t piece) { (*static_cast<const Work*>(held))(piece); };
    done_.store(0, std::memory_order_relaxed);
    const uint64_t number = (state_.load(std::memory_order_relaxed) >> kNumberShift) + 1;
    state_.store(number << kNumberShift | static_cast<uint64_t>(count) << kCountShift);
    calls_.fetch_add(1);
    if (asleep_.load() > 0) calls_.notify_all();
    take_pieces();
    for (int turns = 0; done_.load(std::memory_order_acquire) < count; turns++)
      turns < kPatience ? pause() : static_cast<void>(sched_yield());
  }

 private:
  // state_ is the number of the call, how many pieces it has, and which one is next.
  static constexpr int kCountShift = 20, kNumberShift = 40, kPatience = 1000;
  static constexpr int64_t kMost = (1 << 19) - 1;  // so that threads that find nothing cannot carry into the count
  static constexpr std::chrono::microseconds kAwake{300};

  static void pause() {
#ifdef __x86_64__
    _mm_pause();
#endif
  }

  // A piece that is taken belongs to the call of that number, which cannot end before it is done: so the work is still
  // the one that was set for it.
  void take_pieces() {
    uint64_t state = state_.load(std::memory_order_acquire);
    for (;;) {
      const int64_t piece = state & ((1 << kCountShift) - 1), count = state >> kCountShift & ((1 << kCountShift) - 1);
      if (piece >= count) return;
      if (!state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
      call_(work_, piece);
      done_.fetch_add(1, std::memory_order_acq_rel);
      state = state_.load(std::memory_order_acquire);
    }
  }

  void hire(int count) {
    for (; hired_ < count; hired_++) std::thread([this] { wait_for_work(); }).detach();
  }

  void wait_for_work() {
    uint32_t seen = calls_.load();
    for (;;) {
      take_pieces();
      const auto until = std::chrono::steady_clock::now() + kAwake;
      while (calls_.load(std::memory_order_acquire) == seen && std::chrono::steady_clock::now() < until)
        for (int turn = 0; turn < 8; turn++) pause();
      if (calls_.load(std::memory_order_acquire) == seen) {
        asleep_.fetch_add(1);
        calls_.wait(seen);
        asleep_.fetch_sub(1);
      }
      seen = calls_.load();
    }
  }

  std::mutex turn_;
  std::atomic<uint64_t> state_{0};
  std::atomic<int64_t> done_{0};
  std::atomic<uint32_t> calls_{0};
  std::atomic<int> asleep_{0};
  const void* work_ = nullptr;
  void (*call_)(const void*, int64_t) = nullptr;
  int hired_ = 0;
};

// The process has one, for ever: its threads may wait when the process ends.
inline Team& team() {
  static Team* const found = new Team;
  return *found;
}
