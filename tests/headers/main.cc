// Compiling and linking this program is the test; see CMakeLists.txt.
#include "everything.h"

#include <cstdio>

int main() {
  std::printf("%d headers compile alone and link together\n", TY_NUM_HEADERS);
  return TY_NUM_HEADERS > 0 ? 0 : 1;
}
