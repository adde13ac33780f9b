// Guards against an ORT that is too old or laid out differently than ort_abi.h says.
#pragma once

#include "ort_abi.h"

namespace nmonnx {

struct OrtVersion {
  int64_t api;  // the newest API version that this ORT has
};

// "1.20.1" has API version 20; an unreadable version has 0, a major version above 1 every API version.
OrtVersion ParseOrtVersion(const char* text);

// A status that says which version is needed. Uses only CreateStatus, slot 0 since the first release.
OrtStatus* RefuseOldOrt(const OrtApi* ort, const char* version);

// Sends values through ORT and back. Throws std::runtime_error when one comes back changed.
void CheckAbi(const Api& api);

}  // namespace nmonnx
