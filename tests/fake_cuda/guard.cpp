// A device guard for "cuda" that does nothing: without one, a torch that was built for CPUs has no tensors on CUDA, not
// even fake ones, which have a shape, a type and a device, and no values.
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {
c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> guard;

struct Register {
  Register() { c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, &guard); }
} registered;
}  // namespace
