#include "svg.h"

#include <fmt/core.h>

#include <algorithm>
#include <cmath>

namespace tokenyard::cli {
namespace {

constexpr const char* kStyle = R"(<style>
.chart{--card:#fff;--ink:#1c2430;--soft:#5b6675;--line:#d9dfe7;
--c0:#2f6fde;--c1:#e0832b;--c2:#1f9d76;--c3:#b4489b;--c4:#8a6d1f;--c5:#5d5fd6}
@media(prefers-color-scheme:dark){.chart{--card:#12171f;--ink:#e6ebf2;--soft:#9aa7b8;--line:#2c3644;
--c0:#6aa2ff;--c1:#f5a65b;--c2:#4fd0a5;--c3:#e58bd0;--c4:#d6b95c;--c5:#a3a5ff}}
.chart text{font:13px system-ui,-apple-system,'Segoe UI',Roboto,sans-serif;fill:var(--ink)}
.chart .title{font-size:17px;font-weight:600}
.chart .soft{fill:var(--soft);font-size:12px}
.chart .card{fill:var(--card)}
.chart .grid{stroke:var(--line);stroke-width:1}
.chart .mark{stroke:var(--soft);stroke-width:1.5;stroke-dasharray:5 4}
.chart .curve{fill:none;stroke-width:2.25;stroke-linejoin:round}
.chart .dashed{stroke-dasharray:6 5;opacity:.75}
)";

std::string color_classes() {
  std::string css;
  for (int c = 0; c < 6; ++c) css += fmt::format(".chart .s{0}{{stroke:var(--c{0})}}.chart .f{0}{{fill:var(--c{0})}}\n", c);
  return css + "</style>\n";
}

std::string head(const std::string& title, const std::string& subtitle, double width, double height) {
  return fmt::format(R"(<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 {0:.0f} {1:.0f}" width="{0:.0f}" role="img">
<title>{2}</title>
)",
                     width, height, escaped(title)) +
         kStyle + color_classes() +
         fmt::format(R"(<rect class="card" width="{:.0f}" height="{:.0f}" rx="10"/>
<text class="title" x="24" y="34">{}</text>
<text class="soft" x="24" y="54">{}</text>
)",
                     width, height, escaped(title), escaped(subtitle));
}

std::string text_at(double x, double y, const std::string& text, const char* anchor = "start", const char* css = "") {
  return fmt::format(R"(<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>)", css, x, y, anchor, escaped(text)) + "\n";
}

std::string line(double x0, double y0, double x1, double y1, const char* css) {
  return fmt::format(R"(<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>)", css, x0, y0, x1, y1) + "\n";
}

std::string tick_text(double value) {
  if (value >= 1e6) return fmt::format("{:g}M", value / 1e6);
  if (value >= 1e3) return fmt::format("{:g}k", value / 1e3);
  return fmt::format("{:g}", value);
}

// Maps values to the plot area of a log-log plot.
struct LogAxis {
  double low, high, from, to;  // values; pixels
  double at(double value) const { return from + (to - from) * std::log(value / low) / std::log(high / low); }
};

struct Range {
  double low = 0;
  double high = 0;
  void include(double value) {
    low = high == 0 ? value : std::min(low, value);
    high = std::max(high, value);
  }
};

std::string legend(const LinePlot& plot, double x, double y) {
  std::string out;
  for (const LineSeries& series : plot.series) {
    out += fmt::format(R"(<line class="curve s{}{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>)", series.color % 6,
                       series.dashed ? " dashed" : "", x, y - 4, x + 26, y - 4) +
           text_at(x + 34, y, series.label);
    y += 22;
  }
  return out;
}

std::string curve(const LineSeries& series, const LogAxis& x, const LogAxis& y) {
  std::string path, dots;
  for (const auto& [px, py] : series.points) {
    path += fmt::format("{}{:.1f} {:.1f}", path.empty() ? "M" : "L", x.at(px), y.at(py));
    dots += fmt::format(R"(<circle class="f{}" cx="{:.1f}" cy="{:.1f}" r="3.5"><title>{}: {:g} at {:g}</title></circle>)", series.color % 6,
                        x.at(px), y.at(py), escaped(series.label), py, px) +
            "\n";
  }
  return fmt::format(R"(<path class="curve s{}{}" d="{}"/>)", series.color % 6, series.dashed ? " dashed" : "", path) + "\n" + dots;
}

// A round step that cuts [0, high] into about five.
double linear_step(double high) {
  const double rough = high / 5;
  const double magnitude = std::pow(10, std::floor(std::log10(rough)));
  for (const double step : {1.0, 2.0, 5.0}) {
    if (step * magnitude >= rough) return step * magnitude;
  }
  return 10 * magnitude;
}

}  // namespace

std::string escaped(const std::string& text) {
  std::string out;
  for (const char c : text) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&quot;";
        break;
      default:
        out += c;
    }
  }
  return out;
}

std::vector<double> log_ticks(double low, double high) {
  std::vector<double> all;
  for (double decade = std::pow(10, std::floor(std::log10(low))); decade <= high * 10; decade *= 10) {
    for (const double step : {1.0, 2.0, 5.0}) all.push_back(step * decade);
  }
  auto begin = std::upper_bound(all.begin(), all.end(), low * 1.0001);
  if (begin != all.begin()) --begin;
  const auto end = std::lower_bound(begin, all.end(), high * 0.9999);
  return {begin, end == all.end() ? end : end + 1};
}

std::string line_plot(const LinePlot& plot) {
  constexpr double kWidth = 860, kHeight = 470, kLeft = 76, kRight = 610, kTop = 82, kBottom = 410;
  Range xs, ys;
  for (const LineSeries& series : plot.series) {
    for (const auto& [x, y] : series.points) {
      xs.include(x);
      ys.include(y);
    }
  }
  const std::vector<double> x_ticks = log_ticks(xs.low, xs.high);
  const std::vector<double> y_ticks = log_ticks(ys.low, ys.high);
  // A single value still needs an axis with two ends.
  const LogAxis x{x_ticks.front(), std::max(x_ticks.back(), x_ticks.front() * 2), kLeft, kRight};
  const LogAxis y{y_ticks.front(), std::max(y_ticks.back(), y_ticks.front() * 2), kBottom, kTop};
  std::string out = head(plot.title, plot.subtitle, kWidth, kHeight);
  for (const double tick : x_ticks) {
    out += line(x.at(tick), kTop, x.at(tick), kBottom, "grid") + text_at(x.at(tick), kBottom + 20, tick_text(tick), "middle", "soft");
  }
  for (const double tick : y_ticks) {
    out += line(kLeft, y.at(tick), kRight, y.at(tick), "grid") + text_at(kLeft - 10, y.at(tick) + 4, tick_text(tick), "end", "soft");
  }
  out += text_at((kLeft + kRight) / 2, kBottom + 44, plot.x_label, "middle");
  out += fmt::format(R"svg(<text transform="translate(22 {:.1f}) rotate(-90)" text-anchor="middle">{}</text>)svg", (kTop + kBottom) / 2,
                     escaped(plot.y_label)) +
         "\n";
  for (const LineSeries& series : plot.series) out += curve(series, x, y);
  return out + legend(plot, kRight + 26, kTop + 14) + "</svg>\n";
}

std::string bar_chart(const BarChart& chart) {
  constexpr double kWidth = 860, kLeft = 250, kRight = 760, kTop = 78, kBar = 20, kStep = 26, kGroupGap = 40;
  double high = chart.reference * 1.1;
  double height = kTop;
  for (const BarGroup& group : chart.groups) {
    for (const Bar& bar : group.bars) high = std::max(high, bar.value);
    height += kGroupGap + kStep * static_cast<double>(group.bars.size());
  }
  const double step = linear_step(high);
  const double end = std::ceil(high / step) * step;
  const auto at = [&](double value) { return kLeft + (kRight - kLeft) * value / end; };
  const double bottom = height + 8;
  std::string out = head(chart.title, chart.subtitle, kWidth, bottom + 58);
  for (double tick = 0; tick <= end * 1.001; tick += step) {
    out += line(at(tick), kTop, at(tick), bottom, "grid") + text_at(at(tick), bottom + 20, tick_text(tick), "middle", "soft");
  }
  double y = kTop;
  for (const BarGroup& group : chart.groups) {
    y += kGroupGap;
    out += text_at(24, y - 10, group.label, "start", "soft");
    for (std::size_t b = 0; b < group.bars.size(); ++b) {
      const Bar& bar = group.bars[b];
      out += text_at(kLeft - 10, y + 15, bar.label, "end");
      out += fmt::format(R"(<rect class="f{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.0f}" rx="3"/>)", b % 6, kLeft, y,
                         at(bar.value) - kLeft, kBar) +
             "\n" + text_at(at(bar.value) + 8, y + 15, bar.text);
      y += kStep;
    }
  }
  out += line(at(chart.reference), kTop - 4, at(chart.reference), bottom, "mark");
  out += text_at(at(chart.reference) + 6, kTop + 6, chart.reference_label, "start", "soft");
  return out + text_at((kLeft + kRight) / 2, bottom + 42, chart.axis_label, "middle") + "</svg>\n";
}

}  // namespace tokenyard::cli
