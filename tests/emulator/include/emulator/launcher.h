// The way in from Python: unpacks an array of argument pointers by the kernel's own parameter types.
#pragma once

#include <string>
#include <tuple>
#include <utility>

#include <emulator/cuda.h>  // first: NVRTC has it built in, so that no source includes it

#include <common/types.cuh>

// Bounds of the section that holds the static shared memory of this object; null when it has none.
extern "C" __attribute__((weak, visibility("hidden"))) unsigned char __start_emulator_shared[];
extern "C" __attribute__((weak, visibility("hidden"))) unsigned char __stop_emulator_shared[];

namespace emulator {

// What backend.py compares with the arguments: a kind and a size, "?" where any array will do.
template <typename T>
std::string type_code() {
  using Value = typename std::remove_cv<T>::type;
  if (std::is_pointer<Value>::value) return "*" + type_code<typename std::remove_pointer<Value>::type>();
  if (std::is_same<Value, __half>::value) return "float16";
  if (std::is_same<Value, __nv_bfloat16>::value) return "bfloat16";
  if (std::is_same<Value, float>::value) return "float32";
  if (std::is_same<Value, bool>::value) return "bool";
  if (std::is_integral<Value>::value && sizeof(Value) > 1) return "int" + std::to_string(8 * sizeof(Value));
  if (std::is_class<Value>::value) return "struct" + std::to_string(sizeof(Value));
  return "?";
}
template <>
inline std::string type_code<void>() { return "?"; }
template <>
inline std::string type_code<const void>() { return "?"; }

template <typename... Parameters>
const char* signature(void (*)(Parameters...)) {
  static const std::string codes = ((type_code<Parameters>() + " ") + ... + std::string());
  return codes.c_str();
}

template <typename... Parameters, size_t... kIndex>
int launch(void (*kernel)(Parameters...), const Launch& launch, void** arguments, std::index_sequence<kIndex...>) {
  using Values = std::tuple<void (*)(Parameters...), Parameters...>;
  Values values(kernel, *static_cast<typename std::remove_const<Parameters>::type*>(arguments[kIndex])...);
  auto thread = [](void* closure) {
    const Values& call = *static_cast<const Values*>(closure);
    std::get<0>(call)(std::get<kIndex + 1>(call)...);
  };
  return run(launch, thread, &values, __start_emulator_shared, __stop_emulator_shared);
}

template <typename... Parameters>
int launch(void (*kernel)(Parameters...), const Launch& request, void** arguments) {
  return launch(kernel, request, arguments, std::index_sequence_for<Parameters...>());
}

}  // namespace emulator

#define EMULATOR_KERNEL(...)                                                                     \
  extern "C" EMULATOR_API int emulator_launch(const emulator::Launch* request, void** arguments) { \
    return emulator::launch(__VA_ARGS__, *request, arguments);                                   \
  }                                                                                              \
  extern "C" EMULATOR_API const char* emulator_signature() { return emulator::signature(__VA_ARGS__); }
