// Fibers and barriers of the emulator. Contract: emulator.h.
#include "emulator.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace dam {
namespace emulator {

using cuda::Chip;

namespace {

constexpr size_t STACK_BYTES = size_t{256} << 10;
constexpr int WARP = 32;

// A context's registers that a call preserves live on its stack; what is left of it is where that stack ends.
// swapcontext would do, but it asks the kernel for the signal mask at every switch, which takes 20 times as long.
#if defined(__x86_64__)
extern "C" void dam_switch_stack(void** from, void* to);
asm(R"(
.text
.globl dam_switch_stack
.hidden dam_switch_stack
.type dam_switch_stack, @function
dam_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size dam_switch_stack, .-dam_switch_stack
)");
#endif

// Memory of stacks, kept from launch to launch.
class Stacks {
 public:
  ~Stacks() { release(); }
  char* of(int fiber, int count) {
    if (count > count_) {
      release();
      void* const memory = mmap(nullptr, count * STACK_BYTES, PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) throw std::bad_alloc();
      memory_ = static_cast<char*>(memory);
      count_ = count;
    }
    return memory_ + fiber * STACK_BYTES;
  }

 private:
  void release() {
    if (memory_) munmap(memory_, count_ * STACK_BYTES);
    memory_ = nullptr;
  }
  char* memory_ = nullptr;
  int count_ = 0;
};

struct Fiber {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  char* stack = nullptr;
  void* fake_stack = nullptr;  // of AddressSanitizer
  Place place{};
  int waits_for = -1;  // index of a barrier
  bool done = false;
};

// Threads that wait for each other; those that have ended are not waited for.
struct Barrier {
  int live = 0, waiting = 0;
  uint64_t turn = 0;
};

struct State {
  Chip chip{4, int64_t{8} << 20, true};
  uint64_t order = 0;

  const std::function<void()>* kernel = nullptr;
  std::vector<Fiber> fibers;
  std::vector<Barrier> barriers;    // of the cluster, of its blocks, of their warps
  std::vector<uint64_t> exchanged;  // two pairs for each lane, in turn
  std::vector<uint64_t> exchanges;  // how many each lane has made
  int threads = 0, blocks = 0;
  int running = -1;
  std::exception_ptr error;

  Fiber main;
  const void* main_stack = nullptr;
  size_t main_stack_bytes = 0;
  Stacks stacks;

  int barrier_of(Scope scope, int fiber) const {
    if (scope == Scope::cluster) return 0;
    if (scope == Scope::block) return 1 + fiber / threads;
    return 1 + blocks + fiber / WARP;
  }
};

thread_local State state;

void switch_to(Fiber& from, Fiber& to, bool ends) {
#if defined(__SANITIZE_ADDRESS__)
  const bool to_main = &to == &state.main;
  __sanitizer_start_switch_fiber(ends ? nullptr : &from.fake_stack, to_main ? state.main_stack : to.stack,
                                 to_main ? state.main_stack_bytes : STACK_BYTES);
#endif
#if defined(__x86_64__)
  dam_switch_stack(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
  (void)ends;
}

void leave(Scope scope, int fiber) {
  Barrier& barrier = state.barriers[state.barrier_of(scope, fiber)];
  --barrier.live;
  if (barrier.live > 0 && barrier.waiting == barrier.live) {
    barrier.waiting = 0;
    ++barrier.turn;
  }
}

struct Stopped {};  // unwinds the threads of a kernel that another one's exception has ended

void run_fiber() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &state.main_stack, &state.main_stack_bytes);
#endif
  const int self = state.running;
  try {
    if (!state.error) (*state.kernel)();
  } catch (const Stopped&) {
  } catch (...) {
    state.error = std::current_exception();
  }
  for (const Scope scope : {Scope::warp, Scope::block, Scope::cluster}) leave(scope, self);
  state.fibers[self].done = true;
  switch_to(state.fibers[self], state.main, true);
}

void prepare(Fiber& fiber) {
#if defined(__x86_64__)
  // As if it had been left before its first instruction: 6 registers, where it returns to, and the alignment of a call.
  void** top = reinterpret_cast<void**>(fiber.stack + STACK_BYTES - 16);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&run_fiber);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack = {fiber.stack, 0, STACK_BYTES};
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, run_fiber, 0);
#endif
}

// Runs the threads of a cluster until all have ended.
void run_cluster() {
  const int count = static_cast<int>(state.fibers.size());
  uint64_t random = state.order;
  int left = count;
  while (left > 0) {
    int begin = 0, step = 1;
    if (state.order != 0) {
      random = random * 6364136223846793005u + 1442695040888963407u;
      begin = static_cast<int>((random >> 33) % count);
      step = (random >> 32) & 1 ? 1 : count - 1;
    }
    bool moved = false;
    for (int i = 0, at = begin; i < count; ++i, at = (at + step) % count) {
      Fiber& fiber = state.fibers[at];
      if (fiber.done || fiber.waits_for >= 0) {
        // One that waits goes on once the barrier has turned, which clears what it waits for.
        continue;
      }
      state.running = at;
      switch_to(state.main, fiber, false);
      moved = true;
      if (fiber.done) --left;
    }
    // Barriers that turned release their threads.
    for (Fiber& fiber : state.fibers) {
      if (fiber.waits_for < 0) continue;
      const int barrier = fiber.waits_for >> 1;
      if ((state.barriers[barrier].turn & 1) != static_cast<uint64_t>(fiber.waits_for & 1)) {
        fiber.waits_for = -1;
        moved = true;
      } else if (state.error) {
        fiber.waits_for = -1;  // it ends as soon as it runs
        moved = true;
      }
    }
    if (!moved) {
      state.error = std::make_exception_ptr(std::logic_error("emulator: threads wait at different barriers"));
    }
  }
}

}  // namespace

Chip chip() { return state.chip; }

void pretend(const Chip& chip, uint64_t order) {
  state.chip = chip;
  state.order = order;
}

const Place& place() { return state.fibers[state.running].place; }

void wait_for_all(Scope scope) {
  if (state.error) throw Stopped{};
  const int self = state.running;
  const int index = state.barrier_of(scope, self);
  Barrier& barrier = state.barriers[index];
  if (++barrier.waiting == barrier.live) {  // the last one does not wait
    barrier.waiting = 0;
    ++barrier.turn;
    return;
  }
  state.fibers[self].waits_for = index << 1 | static_cast<int>(barrier.turn & 1);
  switch_to(state.fibers[self], state.main, false);
  if (state.error) throw Stopped{};
}

// What each lane brings, after all have brought theirs: two words of each.
static const uint64_t* bring(uint64_t first, uint64_t second) {
  const int self = state.running;
  // In turn: a lane may bring its next words while others still read these, but not those after.
  const uint64_t turn = state.exchanges[self]++ & 1;
  state.exchanged[4 * self + 2 * turn] = first;
  state.exchanged[4 * self + 2 * turn + 1] = second;
  wait_for_all(Scope::warp);
  return &state.exchanged[4 * (self / WARP * WARP) + 2 * turn];
}

uint64_t exchange(uint64_t bits, int lane) { return bring(bits, 0)[4 * lane]; }

void add_product(double (&sums)[2], double left, double right) {
  const int lane = state.running % WARP;
  const uint64_t* const brought = bring(bit_cast<uint64_t>(left), bit_cast<uint64_t>(right));
  for (int i = 0; i < 2; ++i) {
    for (int k = 0; k < 4; ++k) {
      const auto of_row = bit_cast<double>(brought[4 * (lane / 4 * 4 + k)]);
      const auto of_column = bit_cast<double>(brought[4 * ((lane % 4 * 2 + i) * 4 + k) + 1]);
      sums[i] = std::fma(of_row, of_column, sums[i]);
    }
  }
}

void run(int64_t blocks, int threads, int64_t shared_bytes, int64_t cluster, const std::function<void()>& kernel) {
  if (threads % WARP != 0 || blocks % cluster != 0) throw std::logic_error("emulator: no such grid");
  if (cluster > 1 && !state.chip.clusters) throw std::logic_error("emulator: this chip has no clusters");
  const int count = static_cast<int>(cluster) * threads;
  // 0xFF: a NaN, where a kernel reads what it did not write.
  const auto memory = std::make_unique<char[]>(cluster * shared_bytes + 16);
  char* const shared = memory.get() + (16 - reinterpret_cast<uintptr_t>(memory.get()) % 16) % 16;
  state.kernel = &kernel;
  state.threads = threads;
  state.blocks = static_cast<int>(cluster);
  state.error = nullptr;
  for (int64_t first = 0; first < blocks && !state.error; first += cluster) {
    std::memset(shared, 0xFF, cluster * shared_bytes);
    state.fibers.assign(count, Fiber{});
    state.barriers.assign(1 + cluster + count / WARP, Barrier{});
    state.exchanged.assign(4 * count, 0);
    state.exchanges.assign(count, 0);
    for (int i = 0; i < count; ++i) {
      Fiber& fiber = state.fibers[i];
      fiber.stack = state.stacks.of(i, count);
      fiber.place = {first + i / threads, i % threads, shared + i / threads * shared_bytes};
      for (const Scope scope : {Scope::warp, Scope::block, Scope::cluster}) {
        ++state.barriers[state.barrier_of(scope, i)].live;
      }
      prepare(fiber);
    }
    run_cluster();
  }
  state.fibers.clear();
  if (state.error) std::rethrow_exception(state.error);
}

}  // namespace emulator

namespace cuda {

void check(bool condition, const char* message) {
  if (!condition) throw std::out_of_range(message);
}

}  // namespace cuda
}  // namespace dam
