# Sets NMONNX_HIGHWAY_INCLUDE_DIR. The kernels use Highway's headers only (the CPU is detected in dispatch.cc),
# so any copy from 1.0.3 on will do: an installed one, the pinned release, or the distribution's package
# unpacked inside the build folder.

set(NMONNX_HIGHWAY_VERSION 1.2.0)
set(NMONNX_HIGHWAY_URL https://github.com/google/highway/archive/refs/tags/${NMONNX_HIGHWAY_VERSION}.tar.gz)
set(NMONNX_HIGHWAY_SHA256 7e0be78b8318e8bdbf6fa545d2ecb4c90f947df03f7aadc42c1967f019e63343)
set(_highway_dir ${CMAKE_CURRENT_BINARY_DIR}/highway)

function(nmonnx_installed_highway)
  find_package(hwy QUIET)
  if(TARGET hwy::hwy)
    get_target_property(hint hwy::hwy INTERFACE_INCLUDE_DIRECTORIES)
  endif()
  if(NOT hint)
    set(hint "")
  endif()
  find_path(NMONNX_HIGHWAY_INCLUDE_DIR hwy/foreach_target.h HINTS ${hint}
    DOC "Folder that holds hwy/highway.h")
endfunction()

function(nmonnx_released_highway)
  set(archive ${_highway_dir}/highway.tar.gz)
  file(DOWNLOAD ${NMONNX_HIGHWAY_URL} ${archive} TIMEOUT 60 INACTIVITY_TIMEOUT 5 STATUS status)
  list(GET status 0 failed)
  if(failed)
    return()
  endif()
  file(SHA256 ${archive} sum)
  if(NOT sum STREQUAL NMONNX_HIGHWAY_SHA256)
    message(WARNING "nmonnx: ${NMONNX_HIGHWAY_URL} has SHA256 ${sum}, not ${NMONNX_HIGHWAY_SHA256}; not used")
    return()
  endif()
  execute_process(COMMAND ${CMAKE_COMMAND} -E tar xzf ${archive} WORKING_DIRECTORY ${_highway_dir})
  find_path(NMONNX_HIGHWAY_INCLUDE_DIR hwy/foreach_target.h NO_DEFAULT_PATH
    PATHS ${_highway_dir}/highway-${NMONNX_HIGHWAY_VERSION})
endfunction()

# Neither root nor the system's own apt state is needed: lists, cache and the unpacked files are private.
function(nmonnx_packaged_highway)
  find_program(APT_GET apt-get)
  find_program(DPKG dpkg)
  if(NOT APT_GET OR NOT DPKG)
    return()
  endif()
  set(dir ${_highway_dir}/apt)
  file(MAKE_DIRECTORY ${dir}/lists/partial ${dir}/cache/archives/partial)
  set(private -qq -o Dir::State::lists=${dir}/lists -o Dir::Cache=${dir}/cache -o Debug::NoLocking=1
    -o Acquire::http::Timeout=20 -o Acquire::Retries=1)
  execute_process(COMMAND ${APT_GET} ${private} update RESULT_VARIABLE failed OUTPUT_QUIET ERROR_QUIET TIMEOUT 120)
  execute_process(COMMAND ${APT_GET} ${private} download libhwy-dev WORKING_DIRECTORY ${dir}
    RESULT_VARIABLE failed OUTPUT_QUIET ERROR_QUIET TIMEOUT 120)
  file(GLOB package ${dir}/libhwy-dev_*.deb)
  if(failed OR NOT package)
    return()
  endif()
  execute_process(COMMAND ${DPKG} -x ${package} ${dir}/unpacked RESULT_VARIABLE failed)
  find_path(NMONNX_HIGHWAY_INCLUDE_DIR hwy/foreach_target.h NO_DEFAULT_PATH PATHS ${dir}/unpacked/usr/include)
endfunction()

if(NOT NMONNX_HIGHWAY_INCLUDE_DIR)
  nmonnx_installed_highway()
endif()
if(NOT NMONNX_HIGHWAY_INCLUDE_DIR)
  nmonnx_released_highway()
endif()
if(NOT NMONNX_HIGHWAY_INCLUDE_DIR)
  nmonnx_packaged_highway()
endif()
if(NOT NMONNX_HIGHWAY_INCLUDE_DIR)
  message(FATAL_ERROR
    "Google Highway's headers were not found and could not be fetched; install them (Debian, Ubuntu: libhwy-dev; "
    "Fedora: highway-devel; Homebrew: highway) or pass -DNMONNX_HIGHWAY_INCLUDE_DIR=<folder that holds hwy/>.")
endif()
message(STATUS "nmonnx: Highway in ${NMONNX_HIGHWAY_INCLUDE_DIR}")
