#include "parallel.h"

#include <pthread.h>

#include <atomic>
#include <cfenv>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace offprin::cpu {
namespace {

// Subnormals count, whatever flush-to-zero mode the calling thread is in.
class DefaultFloatingPoint {
 public:
  DefaultFloatingPoint() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloatingPoint() { std::fesetenv(&saved_); }
  DefaultFloatingPoint(const DefaultFloatingPoint&) = delete;
  DefaultFloatingPoint& operator=(const DefaultFloatingPoint&) = delete;

 private:
  std::fenv_t saved_;
};

struct Job {
  Job(const std::function<void(int64_t)>& task, int64_t tasks) : body(task), count(tasks) {}

  const std::function<void(int64_t)>& body;
  const int64_t count;
  std::atomic<int64_t> next{0};
  std::mutex error_lock;
  std::exception_ptr error;

  // Claims tasks until none is left.
  void work() {
    const DefaultFloatingPoint guard;
    for (int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) {
      try {
        body(i);
      } catch (...) {
        const std::lock_guard<std::mutex> hold(error_lock);
        if (!error) error = std::current_exception();
        next.store(count);
      }
    }
  }
};

class Pool {
 public:
  void run(Job& job, int helpers) {
    {
      const std::lock_guard<std::mutex> hold(lock_);
      grow(helpers);
      waiting_.push_back({&job, helpers, 0});
    }
    for (int i = 0; i < helpers; ++i) wake_.notify_one();
    job.work();
    std::unique_lock<std::mutex> hold(lock_);
    find(&job)->places = 0;
    left_.wait(hold, [&] { return find(&job)->inside == 0; });
    waiting_.erase(waiting_.begin() + (find(&job) - waiting_.data()));
  }

 private:
  struct Entry {
    Job* job;
    int places;  // helpers that may still join
    int inside;  // helpers at work
  };

  Entry* find(Job* job) {
    for (Entry& entry : waiting_)
      if (entry.job == job) return &entry;
    return nullptr;
  }

  Entry* open() {
    for (Entry& entry : waiting_)
      if (entry.places > 0) return &entry;
    return nullptr;
  }

  void grow(int wanted) {
    try {
      for (; threads_ < wanted; ++threads_) std::thread([this] { serve(); }).detach();
    } catch (const std::system_error&) {
      // The limit on threads is reached: the ones there are, or the caller alone, do the work.
    }
  }

  void serve() {
    std::unique_lock<std::mutex> hold(lock_);
    for (;;) {
      wake_.wait(hold, [this] { return open() != nullptr; });
      Entry* entry = open();
      Job* job = entry->job;
      --entry->places;
      ++entry->inside;
      hold.unlock();
      job->work();
      hold.lock();
      if (--find(job)->inside == 0) left_.notify_all();
    }
  }

  std::mutex lock_;
  std::condition_variable wake_, left_;
  std::vector<Entry> waiting_;
  int threads_ = 0;
};

// Never destroyed: its threads sleep in it until the process ends. A forked child has none of them and starts anew.
std::atomic<Pool*> pool{nullptr};

void forget() { pool.store(nullptr); }

[[maybe_unused]] const int fork_hook = pthread_atfork(nullptr, nullptr, forget);

Pool& instance() {
  Pool* current = pool.load();
  if (current != nullptr) return *current;
  auto fresh = std::make_unique<Pool>();
  if (pool.compare_exchange_strong(current, fresh.get())) return *fresh.release();
  return *current;
}

}  // namespace

void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& body) {
  Job job(body, count);
  const int64_t helpers = (count < threads ? count : threads) - 1;
  if (helpers > 0)
    instance().run(job, static_cast<int>(helpers));
  else
    job.work();
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace offprin::cpu
