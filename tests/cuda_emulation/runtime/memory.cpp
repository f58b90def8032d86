// Shadow memory: who last wrote and read each four bytes, and whether anything ever wrote them.
//
// Kernels are compiled with g++ -fsanitize=thread but linked to the entry points below instead of
// to the compiler's own runtime; that one knows nothing of barriers, warps and blocks.
#include <cxxabi.h>
#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>

#include "emulation.h"
#include "runtime.h"

namespace latentdem {
namespace emulation {
namespace {

struct Record {
  uint32_t launch, block, epoch, clock;
  uint16_t thread;
  uint8_t bytes;  // which of the four
  bool atomic;
};

struct Cell {
  uint8_t initialised;
  uint32_t launch, block;  // of shared memory: whose contents these are
  Record write, reads[2];
};

enum class Kind { kGlobal, kLent, kShared };

struct Region {
  uintptr_t begin, end;
  Kind kind;
  std::string name;
  std::vector<Cell> cells;
  bool initialised;
};

constexpr size_t kGuard = 256;

// By their first byte; they never overlap.
std::map<uintptr_t, Region> regions;
Region* recent[4] = {};
int next_recent = 0;

void forget_recent() { std::fill(recent, recent + 4, nullptr); }

void add_region(uintptr_t begin, size_t bytes, Kind kind, const std::string& name) {
  // Lent memory that the host has freed since must not live on under new memory. What lies beside
  // stays: another array may have been lent there that was taken for a part of the freed one.
  const uintptr_t end = begin + bytes;
  std::vector<Region> beside;
  const auto keep = [&](const Region& old, uintptr_t from, uintptr_t to) {
    if (old.kind == Kind::kLent && from < to)
      beside.push_back({from, to, old.kind, old.name, {}, true});
  };
  auto it = regions.upper_bound(begin);
  if (it != regions.begin() && std::prev(it)->second.end > begin) --it;
  while (it != regions.end() && it->second.begin < end) {
    keep(it->second, it->second.begin, begin);
    keep(it->second, end, it->second.end);
    it = regions.erase(it);
  }
  forget_recent();
  beside.push_back({begin, end, kind, name, {}, kind == Kind::kLent});
  for (Region& r : beside) {
    r.cells.resize((r.end + 3) / 4 - r.begin / 4);
    regions[r.begin] = std::move(r);
  }
}

Region* find_region(uintptr_t address) {
  for (Region* r : recent)
    if (r != nullptr && address >= r->begin && address < r->end) return r;
  auto it = regions.upper_bound(address);
  if (it == regions.begin()) return nullptr;
  Region& r = std::prev(it)->second;
  if (address >= r.end) return nullptr;
  recent[next_recent++ % 4] = &r;
  return &r;
}

// Static shared arrays, listed by compile.py: address, size, mangled name.
struct SharedVariable {
  char* address;
  size_t bytes;
  const char* name;
};
extern "C" {
extern SharedVariable __start_latentdem_shared[] __attribute__((weak, visibility("hidden")));
extern SharedVariable __stop_latentdem_shared[] __attribute__((weak, visibility("hidden")));
}

std::string demangle(const char* name) {
  int status = 0;
  std::unique_ptr<char, void (*)(void*)> text(abi::__cxa_demangle(name, nullptr, nullptr, &status),
                                              std::free);
  const std::string full = status == 0 ? text.get() : name;
  const size_t colon = full.rfind("::");
  return colon == std::string::npos ? full : full.substr(colon + 2);
}

void add_static_shared() {
  static bool done = false;
  if (done) return;
  done = true;
  for (SharedVariable* v = __start_latentdem_shared; v < __stop_latentdem_shared; ++v)
    add_region(reinterpret_cast<uintptr_t>(v->address), v->bytes, Kind::kShared, demangle(v->name));
}

alignas(256) char dynamic_memory[kMaxShared + 2 * kGuard];

// Constants of this library: segments that cannot be written.
struct Segment {
  uintptr_t begin, end;
};
std::vector<Segment> constants;

int collect_constants(dl_phdr_info* info, size_t, void*) {
  std::vector<Segment> found;
  bool own = false;
  const auto here = reinterpret_cast<uintptr_t>(&dynamic_memory);
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& p = info->dlpi_phdr[i];
    const uintptr_t begin = info->dlpi_addr + p.p_vaddr, end = begin + p.p_memsz;
    if (p.p_type == PT_LOAD && here >= begin && here < end) own = true;
    if ((p.p_type == PT_LOAD && !(p.p_flags & PF_W)) || p.p_type == PT_GNU_RELRO)
      found.push_back({begin, end});
  }
  if (own) constants = found;
  return own;
}

bool is_constant(uintptr_t address) {
  for (const Segment& s : constants)
    if (address >= s.begin && address < s.end) return true;
  return false;
}

// "file.cu:12" of the instruction before a return address, where binutils are installed.
std::string source_line(const void* site) {
  Dl_info info;
  if (site == nullptr || dladdr(site, &info) == 0) return "";
  char command[1024];
  const auto offset =
      reinterpret_cast<uintptr_t>(site) - reinterpret_cast<uintptr_t>(info.dli_fbase) - 1;
  std::snprintf(command, sizeof(command), "addr2line -s -e '%s' 0x%zx 2>/dev/null", info.dli_fname,
                offset);
  std::string line;
  if (FILE* pipe = popen(command, "r")) {
    char text[256] = "";
    if (std::fgets(text, sizeof(text), pipe) != nullptr) line = text;
    pclose(pipe);
  }
  line = line.substr(0, line.find_first_of(" \n"));
  return line.empty() || line[0] == '?' ? "" : " at " + line;
}

std::string action(size_t bytes, bool write, bool atomic) {
  return std::string(atomic  ? "atomic"
                     : write ? "write"
                             : "read") +
         " of " + std::to_string(bytes) + " bytes";
}

std::string where(const Region& r, uintptr_t address) {
  const char* kinds[] = {"global", "global", "shared"};
  return std::string(kinds[static_cast<int>(r.kind)]) + " array '" + r.name + "', byte " +
         std::to_string(static_cast<int64_t>(address - r.begin)) + " of " +
         std::to_string(r.end - r.begin);
}

[[noreturn]] void out_of_bounds(uintptr_t address, size_t bytes, bool write, bool atomic,
                                const void* site) {
  const std::string what = action(bytes, write, atomic) + source_line(site);
  // The array whose border is nearest.
  const Region* nearest = nullptr;
  uintptr_t distance = UINTPTR_MAX;
  for (const auto& item : regions) {
    const Region& r = item.second;
    const uintptr_t d = address >= r.end    ? address - r.end + 1
                        : address < r.begin ? r.begin - address
                                            : 0;
    if (d < distance) distance = d, nearest = &r;
  }
  char text[32];
  std::snprintf(text, sizeof(text), "0x%zx", static_cast<size_t>(address));
  std::string detail = what + " at address " + text;
  if (nearest != nullptr && distance < 1 << 20) detail += ", " + where(*nearest, address);
  fail("out-of-bounds access", detail);
}

bool ordered(const Record& r, const Thread& t) {
  const Launch& l = launch_state;
  if (r.launch != l.number) return true;
  if (r.block != l.block_number) return false;
  if (r.thread == t.rank || r.epoch < l.epoch) return true;
  return r.thread / 32 == t.rank / 32 && t.clocks[r.thread % 32] >= r.clock;
}

[[noreturn]] void race(const Region& region, uintptr_t address, size_t bytes, bool write,
                       bool atomic, const Record& other, bool other_wrote, const void* site) {
  const dim3 b = launch_state.block, g = launch_state.grid;
  const unsigned t = other.thread, n = other.block;
  char text[128];
  std::snprintf(text, sizeof(text), "block (%u,%u,%u), thread (%u,%u,%u)", n % g.x, n / g.x % g.y,
                n / g.x / g.y, t % b.x, t / b.x % b.y, t / b.x / b.y);
  fail("data race", action(bytes, write, atomic) + source_line(site) + ", " +
                        where(region, address) + ", not ordered after the " +
                        (other.atomic  ? "atomic"
                         : other_wrote ? "write"
                                       : "read") +
                        " by " + text);
}

// A cell's record, unless it is of an earlier launch, a barrier ago, or of other bytes.
bool conflicts(const Record& r, const Thread& t, uint8_t bytes, bool atomic) {
  return (r.bytes & bytes) != 0 && !(atomic && r.atomic) && !ordered(r, t);
}

void keep_read(Cell& cell, const Record& r, const Thread& t) {
  for (Record& slot : cell.reads)
    if (ordered(slot, t)) {
      const uint8_t bytes = slot.thread == r.thread && slot.epoch == r.epoch &&
                                    slot.block == r.block && slot.launch == r.launch
                                ? slot.bytes
                                : uint8_t{0};
      slot = r;
      slot.bytes |= bytes;
      return;
    }
  // Two readers that nothing orders are kept: a later writer is at most one of them. A reader of
  // another block matters longer than one of this.
  if (cell.reads[1].block == cell.reads[0].block) cell.reads[1] = r;
}

void touch(Region& region, Cell& cell, uintptr_t address, size_t whole, uint8_t bytes, bool write,
           bool atomic, const void* site) {
  const Launch& l = launch_state;
  const Thread& t = *current;
  if (region.kind == Kind::kShared && (cell.launch != l.number || cell.block != l.block_number)) {
    cell = Cell{};
    cell.launch = l.number;
    cell.block = l.block_number;
  }
  if ((!write || atomic) && !region.initialised && (cell.initialised & bytes) != bytes)
    fail("uninitialised read", action(whole, write, atomic) + source_line(site) + ", " +
                                   where(region, address) + ", which nothing has written");
  if (conflicts(cell.write, t, bytes, atomic))
    race(region, address, whole, write, atomic, cell.write, true, site);
  const Record record{
      l.number, l.block_number, l.epoch, t.clocks[t.rank % 32], static_cast<uint16_t>(t.rank),
      bytes,    atomic};
  if (!write) return keep_read(cell, record, t);
  for (const Record& read : cell.reads)
    if (conflicts(read, t, bytes, atomic))
      race(region, address, whole, write, atomic, read, false, site);
  cell.write = record;
  cell.initialised |= bytes;
}

}  // namespace

void access(const void* pointer, size_t bytes, bool write, bool atomic, const void* site) {
  if (current == nullptr || bytes == 0) return;
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  const auto stack = reinterpret_cast<uintptr_t>(current->stack);
  if (address - stack < kStackBytes) return;
  Region* region = find_region(address);
  if (region == nullptr) {
    const auto arguments = reinterpret_cast<uintptr_t>(launch_state.arguments);
    if (!write && address - arguments < launch_state.argument_bytes) return;
    if (!write && is_constant(address)) return;
    out_of_bounds(address, bytes, write, atomic, site);
  }
  if (address + bytes > region->end) out_of_bounds(address, bytes, write, atomic, site);
  for (uintptr_t at = address; at < address + bytes;) {
    const uintptr_t cell = at / 4, end = std::min(address + bytes, (cell + 1) * 4);
    uint8_t mask = 0;
    for (; at < end; ++at) mask |= static_cast<uint8_t>(1u << at % 4);
    touch(*region, region->cells[cell - region->begin / 4], address, bytes, mask, write, atomic,
          site);
  }
}

void begin_launch() {
  add_static_shared();
  if (constants.empty()) dl_iterate_phdr(collect_constants, nullptr);
  if (launch_state.shared_bytes > 0)
    add_region(reinterpret_cast<uintptr_t>(dynamic_memory) + kGuard, launch_state.shared_bytes,
               Kind::kShared, "dynamic shared memory");
}

// 0xff bytes are NaN in every format, and no index.
void begin_block() {
  std::fill(dynamic_memory, dynamic_memory + launch_state.shared_bytes + 2 * kGuard, '\xff');
}

void end_launch() {
  regions.erase(reinterpret_cast<uintptr_t>(dynamic_memory) + kGuard);
  forget_recent();
}

void* dynamic_shared() { return dynamic_memory + kGuard; }

void* allocate(size_t bytes, const char* name) {
  char* memory =
      static_cast<char*>(std::aligned_alloc(256, (bytes + 2 * kGuard + 255) / 256 * 256));
  if (memory == nullptr) throw std::bad_alloc();
  if (is_planning()) return memory + kGuard;
  std::fill(memory, memory + bytes + 2 * kGuard, '\xff');
  add_region(reinterpret_cast<uintptr_t>(memory) + kGuard, bytes, Kind::kGlobal, name);
  return memory + kGuard;
}

void release(void* pointer) {
  regions.erase(reinterpret_cast<uintptr_t>(pointer));
  forget_recent();
  std::free(static_cast<char*>(pointer) - kGuard);
}

void lend(const void* pointer, size_t bytes, const char* name) {
  const auto begin = reinterpret_cast<uintptr_t>(pointer);
  if (bytes == 0 || is_planning()) return;
  const Region* known = find_region(begin);
  if (known != nullptr && begin + bytes <= known->end) return;
  add_region(begin, bytes, Kind::kLent, name);
}

void take_back() {
  for (auto it = regions.begin(); it != regions.end();)
    it = it->second.kind == Kind::kLent ? regions.erase(it) : std::next(it);
  forget_recent();
}

void atomic_access(void* address, size_t bytes, const void* site) {
  access(address, bytes, true, true, site);
}

}  // namespace emulation
}  // namespace latentdem

// What g++ -fsanitize=thread calls. Atomics are not among them: kernels use CUDA's.
namespace {

void check(const void* address, size_t bytes, bool write, bool aligned, const void* site) {
  using namespace latentdem::emulation;
  if (current != nullptr && aligned && reinterpret_cast<uintptr_t>(address) % bytes != 0)
    fail("misaligned access", action(bytes, write, false) + source_line(site));
  access(address, bytes, write, false, site);
}

}  // namespace

#define LATENTDEM_SITE __builtin_return_address(0)
#define LATENTDEM_ENTRY(n)                                                              \
  void __tsan_read##n(void* p) { check(p, n, false, true, LATENTDEM_SITE); }            \
  void __tsan_write##n(void* p) { check(p, n, true, true, LATENTDEM_SITE); }            \
  void __tsan_unaligned_read##n(void* p) { check(p, n, false, false, LATENTDEM_SITE); } \
  void __tsan_unaligned_write##n(void* p) { check(p, n, true, false, LATENTDEM_SITE); }
extern "C" {
LATENTDEM_ENTRY(1)
LATENTDEM_ENTRY(2)
LATENTDEM_ENTRY(4)
LATENTDEM_ENTRY(8)
LATENTDEM_ENTRY(16)
void __tsan_read_range(void* p, size_t n) { check(p, n, false, false, LATENTDEM_SITE); }
void __tsan_write_range(void* p, size_t n) { check(p, n, true, false, LATENTDEM_SITE); }
void __tsan_vptr_read(void*) {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
// Guards of function-local statics in host code.
uint8_t __tsan_atomic8_load(const volatile uint8_t* p, int) {
  return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
}
