// The next micro-batch on its way while one computes: a thread fills slots, one after the other.
//
// A job is one micro-batch. Its rows are gathered into host memory, and from there copied to a
// device if there is an engine. Three orders are kept, and nothing waits for more than it must:
//
// 1. The side stream waits until the main stream has consumed what was in a slot's device memory.
// 2. The main stream waits for a micro-batch's copies before it computes with it.
// 3. The host waits for a slot's copies before it fills the slot's host memory again.
//
// The caller's side is for one thread. All memory is the caller's, who keeps it until the job is
// received or the ring is joined.
#pragma once

#include <unistd.h>

#include <array>
#include <condition_variable>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "engine.h"
#include "gather.h"

namespace sbp_fast::prefetch {

// Rows of one tensor.
struct Piece {
  Rows rows;
  char* gathered = nullptr;  // where they are gathered; nullptr: they lie in pinned memory already
  char* device = nullptr;    // where they are copied; nullptr: they stay on the host
};

class Ring {
 public:
  static constexpr int kSlots = 2;

  // `engine`: nullptr where the host computes.
  explicit Ring(std::shared_ptr<Engine> engine)
      : engine_(std::move(engine)), process_(getpid()), shared_(std::make_unique<Shared>()) {
    shared_->thread = std::thread([this] { work(); });
  }

  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;

  // Ends what is being filled; what is still queued is never begun.
  ~Ring() {
    if (process_ != getpid()) {
      // The thread is in the other process, and the mutex may be locked for ever.
      (void)shared_.release();
      return;
    }
    {
      std::lock_guard lock(shared_->mutex);
      shared_->closing = true;
    }
    shared_->work_to_do.notify_one();
    shared_->thread.join();
    // Memory is free to go once no copy reads or writes it.
    if (engine_ != nullptr) {
      for (int slot = 0; slot < kSlots; ++slot) {
        try {
          engine_->wait_on_host(slot);
        } catch (const std::exception&) {
          // A device that fails has no copies on their way.
        }
      }
    }
  }

  // Queues a micro-batch and returns its ticket. What the main stream has enqueued so far may still
  // use the device memory of its pieces.
  int64_t submit(std::vector<Piece> pieces, Engine::Main main) {
    check_process();
    const int64_t ticket = next_;
    const int slot = slot_of(ticket);
    {
      std::lock_guard lock(shared_->mutex);
      if (shared_->slots[slot].state != State::kFree) {
        throw std::logic_error("micro-batch " + std::to_string(ticket - kSlots) +
                               " was not received, and its slot is wanted for micro-batch " +
                               std::to_string(ticket) + "; receive or join first");
      }
    }
    if (engine_ != nullptr) engine_->mark_consumed(slot, main);
    {
      std::lock_guard lock(shared_->mutex);
      shared_->slots[slot].state = State::kFilling;
      shared_->jobs.push_back({ticket, std::move(pieces)});
    }
    ++next_;
    shared_->work_to_do.notify_one();
    return ticket;
  }

  // Waits until the micro-batch's rows have been read, and the main stream for its copies. Throws
  // what went wrong on the way.
  void receive(int64_t ticket, Engine::Main main) {
    check_process();
    const int slot = slot_of(ticket);
    std::exception_ptr error;
    {
      std::unique_lock lock(shared_->mutex);
      Slot& received = shared_->slots[slot];
      if (ticket < next_ - kSlots || ticket >= next_ || received.state == State::kFree) {
        throw std::logic_error("micro-batch " + std::to_string(ticket) +
                               " is not on its way; receive each that was submitted, once");
      }
      shared_->filled.wait(lock, [&] { return received.state == State::kFilled; });
      received.state = State::kFree;
      error = std::exchange(received.error, nullptr);
    }
    if (error != nullptr) std::rethrow_exception(error);
    if (engine_ != nullptr) engine_->wait_for_copied(slot, main);
  }

  // Waits until everything submitted has been read from the caller's memory, but for what is
  // pinned.
  void finish_reading() {
    check_process();
    std::unique_lock lock(shared_->mutex);
    wait_until_read(lock);
  }

  // Ends the large batch: nothing is on its way any more, and what was not received is forgotten.
  // The main stream waits for all copies, so that memory freed there is not written to by one that
  // is late; the host waits for those that read pinned memory of the caller's.
  void join(Engine::Main main) {
    check_process();
    std::array<bool, kSlots> borrowed{};
    {
      std::unique_lock lock(shared_->mutex);
      wait_until_read(lock);
      for (int slot = 0; slot < kSlots; ++slot) {
        shared_->slots[slot].state = State::kFree;
        shared_->slots[slot].error = nullptr;
        borrowed[slot] = std::exchange(shared_->slots[slot].borrows, false);
      }
    }
    // The next large batch begins in the first slot, as this one did.
    next_ += (kSlots - next_ % kSlots) % kSlots;
    if (engine_ == nullptr) return;
    for (int slot = 0; slot < kSlots; ++slot) {
      engine_->wait_for_copied(slot, main);
      if (borrowed[slot]) engine_->wait_on_host(slot);
    }
  }

 private:
  // Free until submitted; filling until its rows are read and its copies enqueued; filled until
  // received.
  enum class State { kFree, kFilling, kFilled };

  struct Slot {
    State state = State::kFree;
    bool borrows = false;  // copies have read pinned memory of the caller's
    std::exception_ptr error;
  };

  struct Job {
    int64_t ticket;
    std::vector<Piece> pieces;
  };

  // Behind a pointer, so that a forked child can leave it alone.
  struct Shared {
    std::mutex mutex;
    std::condition_variable work_to_do;
    std::condition_variable filled;
    std::deque<Job> jobs;
    std::array<Slot, kSlots> slots;
    bool closing = false;
    std::thread thread;
  };

  static int slot_of(int64_t ticket) { return static_cast<int>(ticket % kSlots); }

  void check_process() const {
    if (process_ != getpid()) {
      throw std::runtime_error("the ring's thread is in process " + std::to_string(process_) +
                               ", which this one was forked from; make a ring of its own here");
    }
  }

  void wait_until_read(std::unique_lock<std::mutex>& lock) {
    shared_->filled.wait(lock, [&] {
      for (const Slot& slot : shared_->slots) {
        if (slot.state == State::kFilling) return false;
      }
      return true;
    });
  }

  void work() {
    std::unique_lock lock(shared_->mutex);
    while (true) {
      shared_->work_to_do.wait(lock, [&] { return shared_->closing || !shared_->jobs.empty(); });
      if (shared_->closing) return;
      const Job job = std::move(shared_->jobs.front());
      shared_->jobs.pop_front();
      Slot& slot = shared_->slots[slot_of(job.ticket)];
      lock.unlock();
      std::exception_ptr error;
      try {
        fill(slot_of(job.ticket), job.pieces);
      } catch (...) {
        error = std::current_exception();
      }
      lock.lock();
      for (const Piece& piece : job.pieces) slot.borrows |= piece.gathered == nullptr;
      slot.error = std::move(error);
      slot.state = State::kFilled;
      shared_->filled.notify_all();
    }
  }

  void fill(int slot, const std::vector<Piece>& pieces) {
    if (engine_ == nullptr) {
      for (const Piece& piece : pieces) gather(piece.gathered, piece.rows);
      return;
    }
    engine_->wait_on_host(slot);
    engine_->wait_for_consumed(slot);
    // Marked whatever happens: copies that are enqueued read and write the slot's memory.
    std::exception_ptr error;
    try {
      for (const Piece& piece : pieces) send(piece);
    } catch (...) {
      error = std::current_exception();
    }
    engine_->mark_copied(slot);
    if (error != nullptr) std::rethrow_exception(error);
  }

  void send(const Piece& piece) {
    const char* host = piece.rows.first;
    if (piece.gathered != nullptr) {
      gather(piece.gathered, piece.rows);
      host = piece.gathered;
    }
    engine_->copy(piece.device, host, piece.rows.count * piece.rows.row_bytes());
  }

  const std::shared_ptr<Engine> engine_;
  const pid_t process_;
  std::unique_ptr<Shared> shared_;
  int64_t next_ = 0;
};

}  // namespace sbp_fast::prefetch
