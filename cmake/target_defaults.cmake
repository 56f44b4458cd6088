include_guard()

# Sanitizers must see everything, or they report what is not there.
if(TY_SANITIZE)
  add_compile_options(-fsanitize=${TY_SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer)
  add_link_options(-fsanitize=${TY_SANITIZE})
endif()
if(TY_FUZZ)
  add_compile_options(-fsanitize=fuzzer-no-link)
endif()

# What every target of this project is compiled with.
# -ffp-contract=off: a multiply-add is fused where the code says fma, and nowhere else. Results are the same bits everywhere.
function(ty_target_defaults target)
  target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -ffp-contract=off>)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    # g++ 12 at -O3 sees overflows inside std::vector that cannot happen.
    target_compile_options(${target} PRIVATE
      "$<$<COMPILE_LANGUAGE:CXX>:-Wno-stringop-overflow;-Wno-array-bounds;-Wno-restrict;-Wno-maybe-uninitialized>")
  endif()
  if(TY_WERROR)
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Werror>)
  endif()
endfunction()
