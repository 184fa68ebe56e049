// Autograd asks CUDA for a device guard, streams and events, which PyTorch's CPU build lacks. These do nothing.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

using namespace c10;
using Index = DeviceIndex;

constexpr auto CUDA = DeviceType::CUDA;
constexpr Index MOST_DEVICES = 8;
static thread_local Index current = 0;

static Index exchange(Index index) {
  Index before = current;
  current = index < 0 ? current : index;
  return before;
}

static Device with_index(Device device) { return Device(CUDA, device.index() < 0 ? current : device.index()); }

struct Guard final : impl::NoOpDeviceGuardImpl<CUDA> {
  Device exchangeDevice(Device device) const override { return Device(CUDA, exchange(device.index())); }
  Device getDevice() const override { return Device(CUDA, current); }
  void setDevice(Device device) const override { exchange(device.index()); }
  void uncheckedSetDevice(Device device) const noexcept override { exchange(device.index()); }
  Stream getStream(Device device) const noexcept override { return Stream(Stream::DEFAULT, with_index(device)); }
  Stream getDefaultStream(Device device) const override { return Stream(Stream::DEFAULT, with_index(device)); }
  Stream exchangeStream(Stream stream) const noexcept override { return Stream(Stream::DEFAULT, stream.device()); }
  Index deviceCount() const noexcept override { return MOST_DEVICES; }
  void record(void**, const Stream&, const Index, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};

struct Hooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(Index) const override { return false; }
  Index deviceCount() const override { return MOST_DEVICES; }
  Index getCurrentDevice() const override { return current; }
  Index exchangeDevice(Index index) const override { return exchange(index); }
  Index maybeExchangeDevice(Index index) const override { return exchange(index); }
};

static const impl::DeviceGuardImplInterface* own_guard = nullptr;
static void* own_hooks = nullptr;

static auto& guard_slot() { return impl::device_guard_impl_registry[static_cast<size_t>(CUDA)]; }

// The hooks have no state, so another table of virtual functions makes them ours.
static void*& hooks_table() {
  return *reinterpret_cast<void**>(&const_cast<at::CUDAHooksInterface&>(at::detail::getCUDAHooks()));
}

extern "C" void pretend() {
  static Guard guard;
  static Hooks hooks;
  if (own_hooks != nullptr) return;
  own_guard = guard_slot().load();
  own_hooks = hooks_table();
  guard_slot().store(&guard);
  hooks_table() = *reinterpret_cast<void**>(&hooks);
}

extern "C" void restore() {
  if (own_hooks == nullptr) return;
  guard_slot().store(own_guard);
  hooks_table() = own_hooks;
  own_hooks = nullptr;
  current = 0;
}
