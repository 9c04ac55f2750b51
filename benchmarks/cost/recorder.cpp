// The functions of the CUDA runtime that the kernels' library calls, for a GPU that is not there: they answer as the GPU
// named by the environment (VIDLA_RECORD_SMS, VIDLA_RECORD_SHARED, VIDLA_RECORD_ARCH) and write down what would be launched.
// Linked in the runtime's place (nvcc -cudart none); cuda.py reads the record.
#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>

namespace {
std::map<const void*, std::string>& names() {  // of host stubs, which register before this file's own globals exist
  static std::map<const void*, std::string> all;
  return all;
}
std::string launches;  // one line each: kernel, blocks, threads, shared bytes, parameters
struct {
  dim3 grid, block;
  size_t shared;
  void* stream;
} configuration;

int setting(const char* name) {
  const char* text = std::getenv(name);
  return text ? std::atoi(text) : 0;
}
}  // namespace

extern "C" {
void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* stub, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  names()[stub] = name;
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st* stream) {
  configuration = {grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = configuration.grid, *block = configuration.block, *shared = configuration.shared;
  *static_cast<void**>(stream) = configuration.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* stub) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(stub));
  return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void* stub, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t) {
  char text[64];
  launches += names()[stub];
  std::snprintf(text, sizeof text, " %u %u %zu ", grid.x * grid.y * grid.z, block.x * block.y * block.z, shared);
  launches += text;
  const unsigned char* bytes = static_cast<const unsigned char*>(arguments[0]);  // all kernels take one struct by value
  for (int i = 0; i < setting("VIDLA_RECORD_PARAMETERS"); ++i) {
    std::snprintf(text, sizeof text, "%02x", bytes[i]);
    launches += text;
  }
  launches += "\n";
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t stream) {
  return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const int arch = setting("VIDLA_RECORD_ARCH");
  *value = attribute == cudaDevAttrMultiProcessorCount                 ? setting("VIDLA_RECORD_SMS")
           : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin      ? setting("VIDLA_RECORD_SHARED")
           : attribute == cudaDevAttrMaxSharedMemoryPerMultiprocessor  ? setting("VIDLA_RECORD_SHARED") + 1024
           : attribute == cudaDevAttrComputeCapabilityMajor            ? arch / 10
           : attribute == cudaDevAttrComputeCapabilityMinor            ? arch % 10
                                                                       : 0;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "an error of the recorder"; }

// All launches since the last call; the text stays valid until the next one.
__attribute__((visibility("default"))) const char* vidla_recorded() {
  static std::string text;
  text = launches;
  launches.clear();
  return text.c_str();
}
}
