// What a torch that was built for CPUs lacks to compute with fake CUDA tensors, which have a shape, a type and a device,
// and no values: a device guard, one device for the threads of the backward pass, and events. All of it does nothing.
// Loaded by LD_PRELOAD, so that torch calls these functions instead of its own of the same name.
#include <ATen/DeviceAccelerator.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <optional>

namespace {
constexpr auto CUDA = c10::DeviceType::CUDA;

struct Guard : c10::impl::NoOpDeviceGuardImpl<CUDA> {
  c10::Device getDevice() const override { return c10::Device(CUDA, 0); }
  c10::Device exchangeDevice(c10::Device) const override { return getDevice(); }
  c10::Stream getStream(c10::Device) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, getDevice());
  }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
} guard;

struct Register {
  Register() { c10::impl::DeviceGuardImplRegistrar registrar(CUDA, &guard); }
} registered;

struct Hooks : at::CUDAHooksInterface {
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
};
}  // namespace

namespace at::accelerator {
std::optional<c10::DeviceType> getAccelerator(bool) {
  return CUDA;
}
}  // namespace at::accelerator

namespace at::detail {
const CUDAHooksInterface& getCUDAHooks() {
  static const Hooks hooks;
  return hooks;
}
}  // namespace at::detail
