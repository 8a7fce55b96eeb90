// Lets torch's FakeTensorMode act on CUDA devices in a build of torch without CUDA; with CUDA it does so by itself.
#include <c10/core/impl/FakeGuardImpl.h>

namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, FakeGuardImpl<DeviceType::CUDA>);
}
