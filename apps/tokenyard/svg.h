#pragma once
// Charts as stand-alone SVG files that follow the reader's light or dark theme.

#include <string>
#include <utility>
#include <vector>

namespace tokenyard::cli {

struct LineSeries {
  std::string label;
  int color = 0;  // series of one color differ by dashes
  bool dashed = false;
  std::vector<std::pair<double, double>> points;  // x ascending, all values > 0
};
struct LinePlot {
  std::string title;
  std::string subtitle;
  std::string x_label;
  std::string y_label;
  std::vector<LineSeries> series;
};
// Both axes logarithmic.
std::string line_plot(const LinePlot& plot);

struct Bar {
  std::string label;
  double value = 0;
  std::string text;  // behind the bar
};
struct BarGroup {
  std::string label;
  std::vector<Bar> bars;
};
struct BarChart {
  std::string title;
  std::string subtitle;
  std::string axis_label;
  double reference = 0;  // a vertical line at this value, > 0
  std::string reference_label;
  std::vector<BarGroup> groups;
};
std::string bar_chart(const BarChart& chart);

// & < > " as entities.
std::string escaped(const std::string& text);
// 1, 2, 5, 10, ... that cover [low, high], both > 0.
std::vector<double> log_ticks(double low, double high);

}  // namespace tokenyard::cli
